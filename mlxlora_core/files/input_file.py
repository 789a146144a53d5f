"""Files that somebody else wrote: opened without waiting, read up to a limit, told for what they are.

A name that a user or a file gives may stand for a pipe, a device or a loop of
links. Whoever reads such a file opens it here, once, and takes its size and
its bytes from what was opened, so that no other file can come in between.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from mlxlora_core.errors import MlxloraError, ModelError

AGAIN = "download the file again"

_HEAD_BYTES = 512
_MARK = b"\xef\xbb\xbf"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
_POINTER = b"version https://git-lfs"


def is_plain_name(name: Any) -> bool:
    """Whether ``name`` is that of a file in its own folder, on every system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and name == PurePosixPath(name).name == PureWindowsPath(name).name
    )


def is_in_folder(folder: Path, name: Any) -> bool:
    """Whether ``name`` is that of a file in ``folder``, wherever links lead to.

    A download cache keeps the files of a model in ``blobs`` beside ``snapshots``
    and links to them, so that a link to there is none to the outside.
    """
    if not is_plain_name(name):
        return False
    try:
        root, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    blobs = root.parent.parent / "blobs"
    return target.parent == root or (root.parent.name == "snapshots" and target.parent == blobs)


def open_regular(path: Path, kind: type[MlxloraError] = ModelError) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: a link is followed.
        kind: the error to raise.

    Raises:
        MlxloraError: of ``kind``: the file is absent, cannot be read, or is a
            folder, a pipe, a device or a loop of links.
    """
    try:
        # Before it is opened: a device may act on that.
        _require_regular(os.stat(path), path, kind)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except FileNotFoundError as fault:
        raise kind("there is no such file", where=path) from fault
    except OSError as fault:
        raise kind(f"cannot be read: {fault.strerror}", where=path) from fault
    except ValueError as fault:  # a zero byte in the name
        raise kind(f"is no file name: {fault}", where=path) from fault
    file = open(descriptor, "rb")  # noqa: SIM115 - the caller closes it
    try:
        _require_regular(os.fstat(descriptor), path, kind)  # something else may have come there
    except BaseException:
        file.close()
        raise
    return file


def name_of_open(file: BinaryIO) -> str | None:
    """A name that opens the same file again, whatever lies at its path by now; macOS and Linux have one."""
    names = (f"{folder}/{file.fileno()}" for folder in ("/proc/self/fd", "/dev/fd"))
    return next((name for name in names if os.path.exists(name)), None)


def read_exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    """The next ``count`` bytes of an open file.

    Raises:
        ModelError: it ends before, or the disk does not give them.
    """
    data = read_some(file, count, path)
    if len(data) != count:
        raise ModelError(f"ends {count - len(data)} bytes too soon", where=path, fix=AGAIN)
    return data


def read_some(file: BinaryIO, count: int, path: Path) -> bytes:
    """Up to ``count`` bytes of an open file.

    Raises:
        ModelError: the disk does not give them.
    """
    try:
        return file.read(count)
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror}", where=path) from fault


def read_whole(path: Path, limit_bytes: int, kind: type[MlxloraError] = ModelError) -> bytes:
    """The bytes of a file that is small by its nature.

    Raises:
        MlxloraError: of ``kind``: as :func:`open_regular`, or it is larger than ``limit_bytes``.
    """
    with open_regular(path, kind) as file:
        try:
            data = file.read(limit_bytes + 1)
        except OSError as fault:
            raise kind(f"cannot be read: {fault.strerror}", where=path) from fault
    if len(data) > limit_bytes:
        raise kind(f"is larger than {limit_bytes >> 20} MiB", where=path)
    return data


def file_bytes(file: Path | bytes, limit_bytes: int, where: Path) -> bytes:
    """The contents of a file that is small by its nature, or that a checkpoint holds inside another one.

    Args:
        file: where it is, or its contents.
        limit_bytes: the most that it may have.
        where: of the checkpoint, for messages about contents.

    Raises:
        ModelError: as :func:`read_whole`; or a web page or a pointer stands in its place.
    """
    if isinstance(file, bytes):
        if len(file) > limit_bytes:
            raise ModelError(f"holds a file larger than {limit_bytes >> 20} MiB", where=where)
        return file
    with open_regular(file) as opened:
        refuse_stand_in(opened, file)
    return read_whole(file, limit_bytes)


def refuse_stand_in(file: BinaryIO, path: Path) -> bytes:
    """Refuse what servers send in the place of a file; gives the file's first bytes, read from its start.

    Raises:
        ModelError: it is empty, a web page, or the pointer that Git LFS leaves.
    """
    file.seek(0)
    head = read_some(file, _HEAD_BYTES, path)
    file.seek(0)
    if not head:
        raise ModelError("is empty", where=path, fix=AGAIN)
    start = head.removeprefix(_MARK).lstrip().lower()
    if start.startswith(_POINTER):
        raise ModelError("is a Git LFS pointer and not the file itself", where=path, fix="run: git lfs pull")
    if start.startswith(_PAGES):
        raise ModelError(
            "is a web page and not the file itself",
            where=path,
            fix=f"{AGAIN}, logged in where its site asks for it",
        )
    return head


def _require_regular(status: os.stat_result, path: Path, kind: type[MlxloraError]) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise kind(f"is {what}, wanted a regular file", where=path)
