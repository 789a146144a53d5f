"""Arrays of numbers, one for each row: in memory up to a budget, then in files of a temporary folder.

Files are read, never mapped: touching a mapping of a file that somebody has truncated kills the process.
The checksum of a row is compared whenever the row is read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora_core.files.leftovers import NEW, beside, clear_leftovers
from mlxlora_core.training.checkpoints import PREFIX

Numbers = np.ndarray[Any, Any]

_MAGIC = b"mlxlora prefix 1\n"
_SHARE_OF_DISK = 0.5  # of the free space at the start: checkpoints need room too


@dataclass(frozen=True)
class _InFile:
    """Rows in a file.

    Attributes:
        path: of the file.
        head: its first bytes, which identify the rows.
        starts: offset of each row, and the end of the last one.
        sums: the CRC-32 of each row.
        width: numbers per token.
        dtype: of the numbers.
    """

    path: Path
    head: bytes
    starts: tuple[int, ...]
    sums: tuple[int, ...]
    width: int
    dtype: Any

    def read(self, index: int) -> Numbers | None:
        """A row (T, width); None if the file no longer holds what was written."""
        start, end = self.starts[index], self.starts[index + 1]
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                head = os.pread(descriptor, len(self.head), 0)
                content = os.pread(descriptor, end - start, start)
            finally:
                os.close(descriptor)
        except OSError:
            return None
        if head != self.head or len(content) != end - start or zlib.crc32(content) != self.sums[index]:
            return None
        return np.frombuffer(content, self.dtype).reshape(-1, self.width)


#: rows that were stored together: in memory, or in a file
Stored = tuple[Numbers, ...] | _InFile


class RowStore:
    """Stores arrays (T, width), one for each row, while there is room.

    Args:
        budget_bytes: the most that is kept in memory; None is no limit.
        parent: where to make the folder for the files; None is the temporary folder of the system.
        ranks: how many store theirs on this machine; half of the free disk is for all of them.

    Attributes:
        memory_bytes: held in memory.
        file_bytes: written to files.
    """

    def __init__(self, budget_bytes: int | None, parent: Path | None, ranks: int = 1) -> None:
        self._budget, self._parent, self._share = budget_bytes, parent, _SHARE_OF_DISK / ranks
        self._folder: Path | None = None
        self._made: list[Path] = []  # folders above it that were not there
        self._files, self._room = 0, 0
        self.memory_bytes, self.file_bytes = 0, 0
        self._fault = ""  # why no more files are written

    @property
    def fault(self) -> str:
        """Why there is no more room, in words; empty while there is."""
        return self._fault

    def keep(self, key: bytes, rows: Sequence[Numbers]) -> Stored | None:
        """Store rows, each (T, width), and return where they are; None if there is no room.

        Args:
            key: identifies these rows; a file with another key is not read.
            rows: at least one, all of one width.
        """
        size = sum(row.nbytes for row in rows)
        if self._budget is None or self.memory_bytes + size <= self._budget:
            self.memory_bytes += size
            return tuple(rows)
        if self._fault:
            return None
        try:
            return self._write(key, rows, size)
        except OSError as fault:
            self._fault = fault.strerror or str(fault)
            return None

    def read(self, place: Stored, index: int) -> Numbers | None:
        """One of the rows that were stored together; None if its file is damaged."""
        return place.read(index) if isinstance(place, _InFile) else place[index]

    def close(self) -> None:
        """Free the memory and delete the files and their folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        with suppress(OSError):
            while self._made:
                self._made.pop(0).rmdir()
        self.memory_bytes, self.file_bytes = 0, 0

    def _write(self, key: bytes, rows: Sequence[Numbers], size: int) -> _InFile:
        folder = self._folder or self._open()
        self._room -= size
        if self._room < 0:
            raise OSError(0, "half of the space that was free is taken")
        contents = [np.ascontiguousarray(row).tobytes() for row in rows]
        sums = tuple(map(zlib.crc32, contents))
        head = _MAGIC + key + np.array(sums, np.uint32).tobytes()
        starts = [len(head)]
        for content in contents:
            starts.append(starts[-1] + len(content))
        path = folder / f"{self._files:06}"
        self._files += 1
        try:
            with open(path, "xb") as file:
                file.writelines([head, *contents])
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self.file_bytes += size
        return _InFile(path, head, tuple(starts), sums, rows[0].shape[1], rows[0].dtype)

    def _open(self) -> Path:
        """Make the folder, and delete those that killed processes have left."""
        own = self._parent is not None
        parent = self._parent if self._parent is not None else Path(tempfile.gettempdir())
        target = parent / (PREFIX if own else f"mlxlora-{PREFIX}")
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        self._made = missing
        clear_leftovers(parent, target.name)
        folder = beside(target, NEW)
        folder.mkdir(0o700)
        self._folder, self._room = folder, int(self._share * shutil.disk_usage(folder).free)
        return folder
