"""Which files there are, and their texts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mlxlora_core.api import DataError
from mlxlora_core.files import open_regular

ENDINGS = (".rst", ".md", ".markdown")
MOST_BYTES = 4 << 20  # of a file; a page that people read is smaller


def find(path: Path) -> list[Path]:
    """The manuals at a path, sorted by name; links to folders and folders named ``.x`` are not followed.

    Raises:
        DataError: there is none.
    """
    if path.is_file():
        if path.suffix.lower() not in ENDINGS:
            raise DataError(f"is no {' or '.join(ENDINGS)} file", where=path, fix="set path to manuals")
        return [path]
    if not path.is_dir():
        raise DataError("there is no such file or folder", where=path, fix="set path to manuals")
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder) / name for name in names if Path(name).suffix.lower() in ENDINGS]
    if not found:
        wanted = ", ".join(f"*{ending}" for ending in ENDINGS)
        raise DataError(f"there is none of {wanted} in this folder", where=path, fix="set path to manuals")
    return sorted(found)


def named(file: Path, path: Path) -> str:
    """A file's name as records show it: the same wherever the folder stands."""
    return file.name if file == path else file.relative_to(path).as_posix()


def read(file: Path) -> bytes:
    """What a file holds.

    Raises:
        DataError: it cannot be read, is no regular file, or is too large.
    """
    with open_regular(file, DataError) as opened:
        data = opened.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise DataError(f"has more than {MOST_BYTES >> 20} MiB", where=file)
    return data


def text_of(data: bytes) -> str:
    """A file's text; lines end with a line feed.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def stamps(path: Path) -> Mapping[str, str]:
    """File -> size and time of change, for all that the builder would read.

    Raises:
        DataError: as :func:`find`.
    """
    found = {}
    for file in find(path):
        stat = file.lstat()
        found[named(file, path)] = f"{stat.st_size} {stat.st_mtime_ns}"
    return found
