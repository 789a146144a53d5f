"""A file that somebody else writes: in a folder of its own, moved to its place when it is whole."""

from __future__ import annotations

import glob
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxlora_core.errors import SafetyError
from mlxlora_core.files.durable import flush_files, place_of
from mlxlora_core.files.flushing import disk_faults, flush_folder
from mlxlora_core.files.leftovers import NEW, beside, clear_leftovers
from mlxlora_core.files.targets import is_written, refuse_inputs


def check_output_file(
    target: Path, inputs: list[Path], *, overwrite: bool, ours: Callable[[Path], bool]
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


@contextmanager
def new_single_file(target: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary folder, the one file in which becomes ``target`` when the block ends without an exception.

    Args:
        target: may be absent; a file that is there is replaced as :func:`check_output_file` allows.
        overwrite: as there.
        ours: as there.

    Raises:
        SafetyError: the target is not to be replaced.
        ResourceError: the disk is full, or the folder cannot be written.
    """
    with disk_faults(target):
        place = place_of(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(place.parent, glob.escape(place.name))
        check_output_file(target, [], overwrite=overwrite, ours=ours)
        temporary = beside(place, NEW)
        temporary.mkdir(0o700)
    try:
        yield temporary
        check_output_file(target, [], overwrite=overwrite, ours=ours)  # long work lies between
        with disk_faults(target):
            (made,) = temporary.iterdir()
            if place.exists():
                made.chmod(stat.S_IMODE(place.stat().st_mode))
            flush_files([made])
            made.replace(place)
            flush_folder(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
