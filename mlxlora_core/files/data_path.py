"""A data path: a folder with a file for each split, a folder of files, or one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.errors import DataError, listing
from mlxlora_core.files.rows import ENDINGS

SPLITS = ("train", "valid", "test")
RECORD = "dataset.json"  # of a dataset folder that mlxlora made

_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}
_NO_ROWS = (RECORD, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class DataFiles:
    """The files of rows at a data path.

    Attributes:
        splits: split -> its file, for the splits that a file of the folder is named after.
        others: the files that are named after none; the file itself, where the path is one.
    """

    splits: Mapping[str, Path]
    others: tuple[Path, ...] = ()


def find_data(path: Path) -> DataFiles:
    """The files of rows at a path.

    A split may be called as people call it (``val``, ``validation``, ``dev``,
    ``eval`` for ``valid``) and have any ending that rows have.

    Raises:
        DataError: there is nothing, the folder cannot be read, or two files are of one split.
    """
    try:
        if not path.is_dir():
            path.stat()
            return DataFiles({}, (path,))
        names = sorted(os.listdir(path))
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or str(fault)
        absent = isinstance(fault, FileNotFoundError)
        what = "there is no such file or folder" if absent else f"cannot be read: {reason}"
        raise DataError(what, where=path) from fault
    splits: dict[str, Path] = {}
    others = []
    for name in names:
        file = path / name
        if name.startswith(".") or file.suffix.lower() not in ENDINGS or name in _NO_ROWS:
            continue
        split = _SPLIT_OF.get(file.stem.lower())
        if split is None:
            others.append(file)
        elif split in splits:
            both = f"{splits[split].name} and {name}"
            raise DataError(f"{both} could both be the {split} rows", where=path, fix="take one of them away")
        else:
            splits[split] = file
    return DataFiles({split: splits[split] for split in SPLITS if split in splits}, tuple(others))


def absence(path: Path, split: str) -> DataError:
    """The error for a split that a folder has no file for."""
    try:
        there_is = listing(sorted(os.listdir(path)))
    except OSError:
        there_is = "nothing that can be read"
    names, endings = " or ".join(_NAMES[split]), " or ".join(ENDINGS)
    return DataError(
        f"there is no {split}.jsonl (wanted {names} with the ending {endings}; there is {there_is})",
        where=path,
        fix="name the file of these rows so, or make the folder with: mlxlora data",
    )
