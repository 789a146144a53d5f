"""The one writer: no file that mlxlora makes is ever seen half-written.

A file is written under a temporary name in its own folder, flushed to the
disk, renamed over the target, and the folder is flushed too. A folder is built
under a temporary name beside its target and moved there when it is whole.
What a killed process left behind is cleared away by the next one that writes
to the same target.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlxlora_core.errors import ResourceError, SafetyError

# Endings of what is not the target yet, is to be put back if its successor fails, and is to go.
_NEW, _OLD, _GONE = "tmp", "old", "gone"


@contextmanager
def new_file(path: Path, check: Callable[[Path], object] = lambda _: None) -> Iterator[BinaryIO]:
    """An open, seekable binary file that becomes ``path`` when the block ends and ``check`` accepts it.

    ``check`` gets the name of the file while that is a temporary one. Whatever
    the block or it raises leaves an older file as it was. A symbolic link is
    followed; an older file's mode is kept.

    Raises:
        SafetyError: ``path`` is a folder or a device.
        ResourceError: the disk is full, or the folder cannot be written.
    """
    with _disk_faults(path):
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise SafetyError("is no regular file and was left alone", where=path, fix="name another file")
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target.parent, glob.escape(target.name))
        temporary = _beside(target, _NEW)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                if target.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                _flush_to_disk(file.fileno())
            check(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush_folder(target.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` as a file; see :func:`new_file`."""
    with new_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; half a surrogate pair becomes its ``\\ud800`` escape."""
    write_file(path, utf8(text))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON that ends with a newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add ``line`` and a line feed to a log in a single write, so that a reader never sees a part of it."""
    with _disk_faults(path), open(path, "ab") as file:
        file.write(utf8(line) + b"\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a small file.

    Raises:
        ResourceError: ``source`` cannot be read, or as :func:`new_file`.
    """
    with _disk_faults(source, "read"):
        content = source.read_bytes()
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

    Args:
        target: may be absent or empty; one that holds something is replaced
            only when ``overwrite`` is set and ``ours`` recognises it.
        overwrite: whether the caller agreed to replace it.
        ours: whether a folder holds what this writer makes and nothing else.

    Raises:
        SafetyError: the target holds something that is not to be replaced.
        ResourceError: the disk is full, or the folder cannot be written.
    """
    with _disk_faults(target):
        place = target.resolve()  # ".", and what a symbolic link points to, have a name to put another beside
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(place.parent, glob.escape(place.name))
        check_target(target, overwrite=overwrite, ours=ours)
        temporary = _beside(place, _NEW)
        temporary.mkdir()
    try:
        yield temporary
        with _disk_faults(target):
            _flush_folder(temporary)
            _move_folder(temporary, place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush_files(paths: Iterable[Path]) -> None:
    """See to it that files which somebody else has written, and the folders they are in, are on the disk.

    Raises:
        ResourceError: the disk is full.
    """
    folders = set()
    for path in paths:
        with _disk_faults(path), open(path, "rb") as file:
            _flush_to_disk(file.fileno())
        folders.add(path.parent)
    for folder in sorted(folders):
        with _disk_faults(folder):
            _flush_folder(folder)


def remove_folder(target: Path) -> None:
    """Take a folder away at once, then delete it; a reader that has its files open keeps them.

    Raises:
        ResourceError: the folder cannot be taken away.
    """
    gone = _beside(target, _GONE)
    with _disk_faults(target):
        os.replace(target, gone)
    shutil.rmtree(gone, ignore_errors=True)


def put_aside(target: Path, why: str) -> None:
    """Free the name of a folder, where there is one; it is kept beside as ``WHY-NAME-1``, or a higher number.

    Raises:
        ResourceError: it cannot be renamed.
    """
    number = 1
    while (aside := target.with_name(f"{why}-{target.name}-{number}")).exists():
        number += 1
    with _disk_faults(target):
        if target.exists():
            os.replace(target, aside)


def check_target(
    target: Path, *, overwrite: bool = False, ours: Callable[[Path], bool] = lambda _: False
) -> None:
    """Refuse a target folder that holds something; before any work is done.

    Raises:
        SafetyError: as :func:`new_folder`.
        ResourceError: the target cannot be looked into.
    """
    with _disk_faults(target, "read"):
        if not target.is_symlink() and not target.exists():
            return
        if not target.is_dir():
            raise SafetyError("is no folder, and a folder is wanted", where=target, fix="name another folder")
        if not any(target.iterdir()):
            return
        if not ours(target):
            raise SafetyError(
                "the folder holds something else and was left alone", where=target, fix="name another folder"
            )
    if not overwrite:
        raise SafetyError(
            "the folder is there already and was left alone",
            where=target,
            fix="add --overwrite, or name another folder",
        )


def check_file(path: Path) -> None:
    """Refuse a file that could not be written at the end of long work.

    Raises:
        ResourceError: its folder cannot be written, or it is a folder itself.
    """
    with _disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        probe = _beside(path, _NEW)
        probe.touch()
        probe.unlink()


def _move_folder(temporary: Path, target: Path) -> None:
    """Put ``temporary`` in the place of ``target``, which keeps its old content until then."""
    old = _beside(target, _OLD)
    if target.exists() and any(target.iterdir()):
        os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
    _flush_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, ending: str) -> Path:
    """This process's own temporary name beside ``target``."""
    return target.with_name(f".{target.name}.{os.getpid()}.{ending}")


def clear_leftovers(folder: Path, names: str) -> int:
    """Remove what processes that are dead left in ``folder`` of targets like ``names``, a glob pattern.

    One that died between taking an old folder away and putting the new one
    there has its old folder put back.

    Returns:
        How many files and folders are gone or put back.
    """
    cleared = 0
    for path in sorted(folder.glob(f".{names}.*.*")):
        name, owner, ending = path.name[1:].rsplit(".", 2)
        if ending not in (_NEW, _OLD, _GONE) or not owner.isdecimal() or _alive(int(owner)):
            continue
        target = folder / name
        if ending == _OLD and not target.exists():
            os.replace(path, target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        cleared += 1
    return cleared


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # what is under this process's name now was left by a namesake
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _flush_to_disk(descriptor: int) -> None:
    if sys.platform == "darwin":
        # fsync on macOS stops at the drive's own cache.
        import fcntl

        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as fault:
            if fault.errno not in (errno.ENOTSUP, errno.ENOTTY):  # a network drive has no such thing
                raise
            os.fsync(descriptor)
    else:
        os.fsync(descriptor)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_faults(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn what the operating system says about reading or writing into one clear line."""
    try:
        yield
    except OSError as fault:
        full = fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise ResourceError(
            f"cannot be {verb}: {fault.strerror or fault}",
            where=path,
            fix="free some space" if full else f"name a place that can be {verb}",
        ) from fault
