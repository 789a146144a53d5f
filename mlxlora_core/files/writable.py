"""Whether a file or a folder can be written at a place: asked before long work, and before each write."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxlora_core.errors import SafetyError
from mlxlora_core.files.flushing import disk_faults
from mlxlora_core.files.leftovers import NEW, beside, clear_leftovers

#: what to do about something that stands where mlxlora is to write
AWAY = "move it away, or name another"


def check_target(
    target: Path, *, overwrite: bool = False, ours: Callable[[Path], bool] = lambda _: False
) -> None:
    """Refuse a target folder that holds something; before any work is done.

    Raises:
        SafetyError: as :func:`new_folder`.
        ResourceError: the target cannot be looked into.
    """
    with disk_faults(target, "read"):
        if not target.is_symlink() and not target.exists():
            return
        if not target.is_dir():
            raise SafetyError("is no folder, and a folder is wanted", where=target, fix=AWAY)
        if not any(target.iterdir()):
            return
        if not ours(target):
            raise SafetyError("the folder holds something else and was left alone", where=target, fix=AWAY)
    if not overwrite:
        raise SafetyError(
            "the folder is there already and was left alone",
            where=target,
            fix="add --overwrite, or name another folder",
        )


def place_of(path: Path) -> Path:
    """Where ``path`` leads to: absolute, free of links, and with a name to put another beside.

    Raises:
        ResourceError: it is a loop of links, or the working directory is gone.
        SafetyError: it is the root of the file system.
    """
    with disk_faults(path):
        try:
            place = path.resolve()
        except (RuntimeError, ValueError) as fault:  # Python 3.11 and 3.12 say so of a loop of links
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from fault
    if not place.name:
        raise SafetyError("is no place to write to and was left alone", where=path, fix="name another place")
    return place


def refuse_odd_file(path: Path) -> None:
    """Refuse to write in the place of what is no regular file.

    Raises:
        SafetyError: there is a folder, a pipe or a device.
        ResourceError: it cannot be looked at.
    """
    with disk_faults(path, "read"):
        place = place_of(path)
        if os.path.lexists(place) and not stat.S_ISREG(place.stat().st_mode):
            raise SafetyError("is no regular file and was left alone", where=path, fix=AWAY)


def check_file(path: Path) -> None:
    """Refuse a file that could not be written at the end of long work; nothing is left of the attempt.

    Raises:
        ResourceError: its folder cannot be written.
        SafetyError: a folder, a pipe or a device is there.
    """
    refuse_odd_file(path)
    with disk_faults(path), _probe(place_of(path)) as probe:
        probe.touch(0o600)
        probe.unlink()


def check_folder(path: Path) -> None:
    """:func:`check_file` for a folder, which need not be there.

    Raises:
        ResourceError: nothing can be written in it.
        SafetyError: something that is no folder is there.
    """
    place = place_of(path)
    with disk_faults(path):
        if os.path.lexists(place) and not place.is_dir():
            raise SafetyError("is no folder, and a folder is wanted", where=path, fix="move it away")
        with _probe(place / "probe" if place.is_dir() else place) as probe:
            probe.mkdir(0o700)
            probe.rmdir()


@contextmanager
def _probe(target: Path) -> Iterator[Path]:
    """A free name beside ``target``; the folders that had to be made for it go again if nobody uses them."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target.parent, glob.escape(target.name))
        yield beside(target, NEW)
    finally:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
