"""Room on a disk that is held until it is needed, so that who fills the disk takes it from nobody."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

LEAST_SHARE = 3  # so many times as much must be free, or holding would take what it is held for
FULL_BYTES = 4 << 20  # with less than that free, a disk is full

_PART = bytes(1 << 20)


class Room:
    """Bytes of the disk that a folder is on; none at first.

    They are a file without a name: whatever ends the process, they are free again.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._folder = Path()

    @property
    def held(self) -> bool:
        """Whether there are some."""
        return self._file is not None

    def hold(self, folder: Path, count: int) -> None:
        """Hold so many bytes, where there is enough beside them; else none, and nobody is told."""
        self.release()
        with suppress(OSError):
            if shutil.disk_usage(folder).free < LEAST_SHARE * count:
                return
            self._file, self._folder = tempfile.TemporaryFile(dir=folder), folder  # noqa: SIM115 - stays open
            try:
                _fill(self._file, count)
            except OSError:
                self.release()
                raise

    def release(self) -> None:
        """Let them go, from whatever thread."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def release_where_full(self) -> None:
        """Let them go where the disk is full."""
        if self.held:
            with suppress(OSError):
                if shutil.disk_usage(self._folder).free < FULL_BYTES:
                    self.release()


def is_full(fault: BaseException) -> bool:
    """Whether a fault says that a disk is full."""
    return isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT)


def _fill(file: IO[bytes], count: int) -> None:
    """Have so many bytes of the disk for a file, where a file of zeros would not take them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, count)
        return
    for _ in range(-(-count // len(_PART))):
        file.write(_PART)
    file.flush()
