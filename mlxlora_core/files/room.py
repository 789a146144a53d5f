"""Room on a disk that is held until it is needed, so that who fills the disk takes it from nobody."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from mlxlora_core.errors import ResourceError

T = TypeVar("T")

LEAST_SHARE = 3  # so many times as much must be free, or holding would take what it is held for
FULL_BYTES = 4 << 20  # with less than that free, a disk is full
SETTLE_SECONDS = 5.0  # so long is waited for who may be filling the disk

_PART = bytes(1 << 20)
_lock = threading.Lock()  # for what follows
_rooms: list[Room] = []  # that are held
_released = 0  # how often some was let go


class Room:
    """Bytes of the disk that a folder is on; none at first.

    They are a file without a name: whatever ends the process, they are free again.

    Args:
        settle: waits until whoever may be filling the disk has found out that it is full, or that many
            seconds; else the room would be filled too.
    """

    def __init__(self, settle: Callable[[float], object] = lambda seconds: None) -> None:
        self.settle = settle
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
            _rooms.append(self)
            try:
                _fill(self._file, count)
            except OSError:
                self.release()
                raise

    def release(self) -> None:
        """Let them go, from whatever thread."""
        global _released
        with _lock:  # until the disk has the bytes, which takes a moment
            file, self._file = self._file, None
            if file is not None:
                _rooms.remove(self)
                file.close()
                _released += 1

    def release_where_full(self) -> None:
        """Let them go where the disk is full."""
        if self.held:
            with suppress(OSError):
                if shutil.disk_usage(self._folder).free < FULL_BYTES:
                    self.release()


def written(write: Callable[[], T]) -> T:
    """What some writing gives; it is done once more where it fails and there was room held for it.

    Args:
        write: leaves nothing behind where it fails.

    Raises:
        ResourceError: as ``write`` raises.
    """
    before = _released
    try:
        return write()
    except ResourceError:
        with _lock:
            there_is_some = bool(_rooms) or _released != before
        if not there_is_some:
            raise
    for room in list(_rooms):
        room.settle(SETTLE_SECONDS)
        room.release()
    return write()


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
