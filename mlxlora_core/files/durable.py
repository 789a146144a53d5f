"""The one writer: no file that mlxlora makes is ever seen half-written.

A file is written under a temporary name in its own folder, flushed to the disk, renamed over
the target, and the folder is flushed too. A folder is built under a temporary name beside its
target and moved there when it is whole. What a killed process left behind is cleared away by the
next one that writes to the same target.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlxlora_core.errors import SafetyError
from mlxlora_core.files.exchange import exchange
from mlxlora_core.files.flushing import disk_faults, flush_folder, flush_to_disk
from mlxlora_core.files.leftovers import GONE, NEW, OLD, beside, clear_leftovers
from mlxlora_core.files.room import written

AWAY = "move it away, or name another"


@contextmanager
def new_file(path: Path, check: Callable[[Path], object] = lambda _: None) -> Iterator[BinaryIO]:
    """An open, seekable binary file that becomes ``path`` when the block ends and ``check`` accepts it.

    ``check`` gets the name of the file while that is a temporary one. Whatever
    the block or it raises leaves an older file as it was. A symbolic link is
    followed; the new file has the mode of an older one from its first byte on.

    Raises:
        SafetyError: ``path`` is a folder or a device.
        ResourceError: the disk is full, or the folder cannot be written.
    """
    with disk_faults(path):
        target = place_of(path)
        refuse_odd_file(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target.parent, glob.escape(target.name))
        temporary = beside(target, NEW)
        try:
            with _created(temporary, target) as file:
                yield file
                file.flush()
                flush_to_disk(file.fileno())
            check(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_folder(target.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` as a file; see :func:`new_file`."""

    def write() -> None:
        with new_file(path) as file:
            file.write(content)

    written(write)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; half a surrogate pair becomes its ``\\ud800`` escape."""
    write_file(path, utf8(text))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON that ends with a newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add ``line`` and a line feed to a log in a single write, so that a reader never sees a part of it."""
    end: list[int] = []

    def write() -> None:
        with disk_faults(path), open(path, "ab", buffering=0) as file:
            if end:  # what a write has left that found the disk full
                file.truncate(end[0])
            end.append(file.tell())
            if file.write(content := utf8(line) + b"\n") < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written(write)


def copy_file(source: Path | bytes, target: Path) -> None:
    """Copy a small file, or contents that stand inside another one.

    Raises:
        ResourceError: ``source`` cannot be read, or as :func:`new_file`.
    """
    with disk_faults(target if isinstance(source, bytes) else source, "read"):
        content = source if isinstance(source, bytes) else source.read_bytes()
    write_file(target, content)


def version(path: Path) -> tuple[int, ...] | None:
    """What tells a file or folder from the one that this writer puts in its place; None when there is none.

    A reader that opens more than one file, or one twice, compares it before and after.
    """
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


def utf8(text: str) -> bytes:
    """``text`` in UTF-8. Half a surrogate pair, which UTF-8 cannot hold, becomes what JSON writes for it."""
    return text.encode("utf-8", "backslashreplace")


@contextmanager
def new_folder(
    target: Path, *, overwrite: bool = False, ours: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends without an exception.

    It has the mode of the folder that it replaces, and its files those of the
    files that they replace. At every instant the target is the old folder or
    the new one, where the file system lets two names change places.

    Args:
        target: may be absent or empty; one that holds something is replaced
            only when ``overwrite`` is set and ``ours`` recognises it.
        overwrite: whether the caller agreed to replace it.
        ours: whether a folder holds what this writer makes and nothing else.

    Raises:
        SafetyError: the target holds something that is not to be replaced.
        ResourceError: the disk is full, or the folder cannot be written.
    """
    with disk_faults(target):
        place = place_of(target)  # ".", and what a symbolic link points to, have a name to put another beside
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(place.parent, glob.escape(place.name))
        check_target(target, overwrite=overwrite, ours=ours)
        temporary = beside(place, NEW)
        temporary.mkdir()
        mode = _mode(place if place.exists() else temporary)
        temporary.chmod(0o700)  # nobody else looks in before its files have the modes of the old ones
    try:
        yield temporary
        with disk_faults(target):
            flush_folder(temporary)
            _take_modes(place, temporary)
            temporary.chmod(mode)
            check_target(target, overwrite=overwrite, ours=ours)  # long work lies between
            _move_folder(temporary, place, ours)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_single_file(target: Path, check: Callable[[], object]) -> Iterator[Path]:
    """A temporary folder, the one file in which becomes ``target`` when the block ends without an exception.

    It is for a file that somebody else writes, who takes a path; it has the mode of one that it replaces.

    Args:
        target: may be absent.
        check: refuses a target that is not to be replaced; it is asked before the block and after it.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    with disk_faults(target):
        place = place_of(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(place.parent, glob.escape(place.name))
        check()
        temporary = beside(place, NEW)
        temporary.mkdir(0o700)
    try:
        yield temporary
        check()  # long work lies between
        with disk_faults(target):
            (made,) = temporary.iterdir()
            if place.exists():
                made.chmod(_mode(place))
            flush_files([made])
            os.replace(made, place)
            flush_folder(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_files(paths: Iterable[Path]) -> None:
    """See to it that files which somebody else has written, and the folders they are in, are on the disk.

    Raises:
        ResourceError: the disk is full.
    """
    folders = set()
    for path in paths:
        with disk_faults(path), open(path, "rb") as file:
            flush_to_disk(file.fileno())
        folders.add(path.parent)
    for folder in sorted(folders):
        with disk_faults(folder):
            flush_folder(folder)


def remove_folder(target: Path) -> None:
    """Take a folder away at once, then delete it; a reader that has its files open keeps them.

    Raises:
        ResourceError: the folder cannot be taken away.
    """
    gone = beside(target, GONE)
    with disk_faults(target):
        os.replace(target, gone)
    shutil.rmtree(gone, ignore_errors=True)


def put_aside(folder: Path, why: str, target: Path | None = None) -> None:
    """Free the name of a folder, where there is one; it is kept beside as ``WHY-NAME-1``, or a higher number.

    Args:
        folder: to move.
        why: the first word of its new name.
        target: whose name it gets, if that is not its own.

    Raises:
        ResourceError: it cannot be renamed.
    """
    name, number = (target or folder).name, 1
    while os.path.lexists(aside := folder.with_name(f"{why}-{name}-{number}")):
        number += 1
    with disk_faults(folder):
        if folder.exists():
            os.replace(folder, aside)


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


def _created(temporary: Path, target: Path) -> BinaryIO:
    """A new file that nobody may read who may not read the one that it is to replace."""
    try:
        old = target.stat()
    except FileNotFoundError:
        return open(temporary, "xb")
    owner = (old.st_uid, old.st_gid)
    mode = stat.S_IMODE(old.st_mode)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode & 0o700)
    made = os.fstat(descriptor)
    if (made.st_uid, made.st_gid) != owner:
        with suppress(OSError):  # only the superuser may give a file away
            os.fchown(descriptor, *owner)
    os.fchmod(descriptor, mode)
    return os.fdopen(descriptor, "wb")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _take_modes(old: Path, new: Path) -> None:
    """Give what is below ``new`` the modes that its namesakes below ``old`` have."""
    for path in new.rglob("*") if old.is_dir() else ():
        namesake = old / path.relative_to(new)
        if not path.is_symlink() and namesake.exists():
            path.chmod(_mode(namesake))


def _move_folder(temporary: Path, target: Path, ours: Callable[[Path], bool]) -> None:
    """Put ``temporary`` in the place of ``target``, which keeps its old content until then."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(temporary, target)
        flush_folder(target.parent)
        return
    old = temporary if exchange(temporary, target) else _moved_away(temporary, target)
    flush_folder(target.parent)
    if not ours(old):  # somebody has put a file into it meanwhile
        put_aside(old, "kept", target)
    shutil.rmtree(old, ignore_errors=True)


def _moved_away(temporary: Path, target: Path) -> Path:
    """:func:`exchange` in two steps, between which there is no target; where the old folder is now."""
    old = beside(target, OLD)
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(old, target)
        raise
    return old
