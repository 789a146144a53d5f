"""Having bytes and names on the disk, and what the system says when it cannot, in one line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxlora_core.errors import ResourceError
from mlxlora_core.path_text import too_long

# What a file system says that has nothing to flush by.
_NO_FLUSHING = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def flush_to_disk(descriptor: int) -> None:
    """Have the bytes of an open file on the disk, where its file system can do that."""
    if sys.platform == "darwin":
        # fsync on macOS stops at the drive's own cache.
        import fcntl

        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as fault:
            if fault.errno not in (errno.ENOTSUP, errno.ENOTTY):  # a network drive has no such thing
                raise
            os.fsync(descriptor)
        return
    try:
        os.fsync(descriptor)
    except OSError as fault:
        if fault.errno not in _NO_FLUSHING:
            raise


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where its file system can do that.

    What was written is there by then and counts: some file systems flush no
    folders, and a folder that may be written need not be one that may be read.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flush_to_disk(descriptor)
        finally:
            os.close(descriptor)


_FIXES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space")
_FIXES[errno.EFBIG] = "raise ulimit -f, or name a place on another file system"


@contextmanager
def disk_faults(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn what the operating system says about reading or writing into one clear line."""
    try:
        yield
    except OSError as fault:
        said = f"cannot be {verb}: {fault.strerror or fault}"
        fix = _FIXES.get(fault.errno or 0, f"name a place that can be {verb}")
        raise too_long(fault, path) or ResourceError(said, where=path, fix=fix) from fault
