"""A data path: a folder with a file for each split, a folder of files, or one file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
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
_PART = re.compile(r"-(\d+)-of-(\d+)$")
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}
_NO_ROWS = (RECORD, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class DataFiles:
    """The files of rows at a data path, one at least.

    Attributes:
        splits: split -> its files, for the splits that files of the folder are named after.
        others: the files that are named after none; the file itself, where the path is one.
    """

    splits: Mapping[str, tuple[Path, ...]]
    others: tuple[Path, ...] = ()


def find_data(path: Path) -> DataFiles:
    """The files of rows at a path.

    A split may be called as people call it (``val``, ``validation``, ``dev``,
    ``eval`` for ``valid``), have any ending that rows have, and lie in parts
    (``train-00000-of-00002.jsonl``).

    Raises:
        DataError: there is no file of rows, the folder cannot be read, or two files could be one split.
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
    files = [path / name for name in names if not name.startswith(".") and name not in _NO_ROWS]
    files = [file for file in files if file.suffix.lower() in ENDINGS]
    if not files:
        what = f"there is no file of rows in this folder ({' or '.join(ENDINGS)}); there is {listing(names)}"
        raise DataError(what, where=path)
    found: dict[str | None, list[Path]] = {}
    for file in files:
        found.setdefault(_SPLIT_OF.get(_PART.sub("", file.stem.lower())), []).append(file)
    splits = {split: tuple(found[split]) for split in SPLITS if split in found}
    for split, several in splits.items():
        if odd := _not_one(several):
            raise DataError(f"{odd} the {split} rows", where=path, fix="leave one file, or all parts of one")
    return DataFiles(splits, tuple(found.get(None, ())))


def _not_one(files: Sequence[Path]) -> str:
    """Why files are not one split, whole or in all of its parts."""
    parts = [_PART.search(file.stem) for file in files]
    found = [part for part in parts if part]
    stems = {(_PART.sub("", file.stem), file.suffix) for file in files}
    if len(files) > 1 and (len(found) < len(files) or len(stems) > 1):
        return f"{files[0].name} and {files[1].name} could both be"
    counts = {int(part[2]) for part in found}
    if found and counts != {len(found)}:
        return f"there are {len(found)} of {listing(sorted(counts))} parts of"
    numbers = sorted(int(part[1]) for part in found)
    if numbers and numbers not in ([*range(len(found))], [*range(1, len(found) + 1)]):
        return f"the {len(found)} parts there are have the numbers {listing(numbers)} and cannot be all of"
    return ""


def file_names() -> list[str]:
    """Every name that a file of rows, or the record of a data folder, may have; parts are left aside."""
    return [RECORD, *(f"{name}{ending}" for name in _SPLIT_OF for ending in ENDINGS)]


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
