"""What may be written where: no output is an input, and nothing is replaced that mlxlora did not write.

Every output of every verb passes here before work begins. That something is ours is proved by what
it holds, and not by what it is called.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlxlora_core.errors import SafetyError, UsageError
from mlxlora_core.files.writable import AWAY, check_target, place_of, refuse_odd_file


def refuse_inputs(target: Path, inputs: Iterable[Path]) -> None:
    """Refuse a file or folder to write that is read too, or that would take what is read with it.

    Args:
        target: to write, there already or not.
        inputs: files and folders that are read, there or not.

    Raises:
        UsageError: it is one of them, by whatever name, or a folder that is there and holds one.
        MlxloraError: as :func:`~mlxlora_core.files.writable.place_of`.
    """
    place = place_of(target)
    holds = place.is_dir()
    for source in inputs:
        try:
            read = Path(os.path.realpath(source))
        except (OSError, ValueError):  # whoever reads it tells
            continue
        if read == place or _is_same(read, place) or (holds and place in read.parents):
            raise UsageError(
                f"is an input of this command ({source}) and was left alone",
                where=target,
                fix="name another place to write to",
            )


def check_output_folder(
    target: Path, inputs: Iterable[Path], *, overwrite: bool, ours: Callable[[Path], bool]
) -> None:
    """Refuse a folder to write that is somebody else's, that is read too, or that is there already.

    Args:
        target: to write.
        inputs: what is read for it.
        overwrite: whether the caller agreed to replace a folder of ours.
        ours: whether a folder holds what mlxlora writes there, and nothing else.

    Raises:
        SafetyError: it holds something else, or is ours and not to be overwritten.
        UsageError: as :func:`refuse_inputs`.
        ResourceError: it cannot be looked into.
    """
    check_target(target, overwrite=True, ours=ours)
    refuse_inputs(target, inputs)
    check_target(target, overwrite=overwrite, ours=ours)


def check_output_file(
    target: Path, inputs: Iterable[Path], *, overwrite: bool, ours: Callable[[Path], bool]
) -> None:
    """Refuse a file to write that is somebody else's, that is read too, or that is there already.

    Args:
        target: to write.
        inputs: what is read for it.
        overwrite: whether the caller agreed to replace a file of ours.
        ours: whether what a file holds shows that mlxlora has written it.

    Raises:
        SafetyError: it holds something else, or is ours and not to be overwritten.
        UsageError: it is one of the inputs.
        ResourceError: it cannot be looked at.
    """
    refuse_inputs(target, inputs)
    if is_written(target, ours) and not overwrite:
        raise SafetyError(
            "the file is there already and was left alone",
            where=target,
            fix="add --overwrite, or name another file",
        )


def is_written(path: Path, ours: Callable[[Path], bool]) -> bool:
    """Whether there is a file of ours to replace; an empty file is nobody's.

    Args:
        path: of a file to write.
        ours: whether what a file holds shows that mlxlora has written it.

    Raises:
        SafetyError: somebody else's file is there, or what is no regular file.
        ResourceError: it cannot be looked at.
    """
    refuse_odd_file(path)
    if not path.exists() or not path.stat().st_size:
        return False
    if not ours(path):
        raise SafetyError(
            "was not written by mlxlora for this and was left alone",
            where=path,
            fix=AWAY,
        )
    return True


def paths_in(options: Any) -> Iterator[Path]:
    """Every path among the values of an options dataclass: what a component is told to read."""
    for field in dataclasses.fields(options) if dataclasses.is_dataclass(options) else ():
        value = getattr(options, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Path):
                yield item


def hold_only_files(folder: Path, names: Iterable[str]) -> bool:
    """Whether everything in a folder is a regular file of one of these names; a link is none."""
    known = set(names)
    return all(path.name in known and not path.is_symlink() and path.is_file() for path in folder.iterdir())


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
