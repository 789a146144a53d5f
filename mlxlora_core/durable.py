"""The one writer: no file that mlxlora makes is ever seen half-written.

A file is written under a temporary name in its own folder, flushed to the
disk, renamed over the target, and the folder is flushed too. A folder is built
under a temporary name beside its target and moved there when it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlxlora_core.errors import ResourceError, SafetyError


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` with an open binary file that then becomes ``path``.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                _flush_to_disk(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON that ends with a newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add one line to a log in a single write, so that a reader never sees a part of it."""
    with _disk_faults(path), open(path, "ab") as file:
        file.write(line.encode() + b"\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of ``source``."""
    with open(source, "rb") as original:
        write_file(target, lambda file: shutil.copyfileobj(original, file))


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
    check_target(target, overwrite=overwrite, ours=ours)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _flush_folder(temporary)
            _move_folder(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_target(
    target: Path, *, overwrite: bool = False, ours: Callable[[Path], bool] = lambda _: False
) -> None:
    """Refuse a target folder that holds something; before any work is done.

    Raises:
        SafetyError: as :func:`new_folder`.
    """
    if target.is_symlink() or target.exists():
        if not target.is_dir():
            raise SafetyError("is a file, wanted a folder", where=target, fix="name another folder")
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


def _move_folder(temporary: Path, target: Path) -> None:
    """Put ``temporary`` in the place of ``target``, which keeps its old content until then."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists() and any(target.iterdir()):
        os.replace(target, old)
    os.replace(temporary, target)
    _flush_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush_to_disk(descriptor: int) -> None:
    if sys.platform == "darwin":
        # fsync on macOS stops at the drive's own cache.
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_faults(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing into one clear line."""
    try:
        yield
    except OSError as fault:
        full = fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise ResourceError(
            f"cannot be written: {fault.strerror or fault}",
            where=path,
            fix="free some space" if full else "name a folder that can be written",
        ) from fault
