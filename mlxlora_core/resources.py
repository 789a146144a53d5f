"""Disk and memory: how much work will need, how much is free, and what it looks like to run out.

Before long work both figures are said, and work that cannot end well is refused
before it has written anything.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from mlxlora_core.errors import ResourceError
from mlxlora_core.limits import free_memory_bytes

#: what the operating system says when a limit of the machine or of the user is reached
LIMITS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
#: what MLX says, on any backend, when it gets no memory
_NO_MEMORY = ("unable to allocate", "out of memory", "insufficient memory", "maximum allowed buffer size")

#: what MLX says when a GPU gives up
_NO_GPU = ("command buffer execution failed", "cuda error", "gpu timeout")


def exhausted(fault: BaseException) -> ResourceError | None:
    """The error that a fault of disk, memory, GPU or a limit is for the user; None for any other fault."""
    if isinstance(fault, MemoryError) or (
        isinstance(fault, RuntimeError) and any(words in str(fault).lower() for words in _NO_MEMORY)
    ):
        return ResourceError(
            f"there is not enough memory{f': {fault}' if str(fault) else ''}",
            fix="use a smaller model, smaller batches or shorter rows",
        )
    if isinstance(fault, RuntimeError) and any(words in str(fault).lower() for words in _NO_GPU):
        return ResourceError(f"the GPU gave up: {fault}", fix="give the same command again")
    if isinstance(fault, OSError) and fault.errno in LIMITS:
        where = os.fsdecode(fault.filename) if isinstance(fault.filename, (str, bytes)) else ""
        return ResourceError(str(fault.strerror), where=where, fix="free it, raise the limit or name another")
    return None


# --- disk ---------------------------------------------------------------------


def require_disk(need: int, target: Path) -> str:
    """What ``target`` needs on its disk and what is free there, in words.

    Args:
        need: bytes.
        target: file or folder that is to be written.

    Raises:
        ResourceError: less is free.
    """
    there = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if need > free:
        raise ResourceError(
            f"{_size(need)} of disk are needed, {_size(free)} are free",
            where=target,
            fix="free some space, or name a place on another disk",
        )
    return f"{target} needs {_size(need)} of disk, {_size(free)} are free"


# --- memory -------------------------------------------------------------------


def require_memory(need: int, work: str, fix: str) -> str:
    """What ``work`` will need of memory and what is free, in words.

    Args:
        need: bytes, beyond what this process holds.
        work: what needs them.
        fix: what the user can do about it.

    Raises:
        ResourceError: less is free.
    """
    free = free_memory_bytes()
    if free is None:
        return f"{work} needs about {_size(need)} of memory"
    if need > free:
        raise ResourceError(f"{work} needs about {_size(need)} of memory, {_size(free)} are free", fix=fix)
    return f"{work} needs about {_size(need)} of memory, {_size(free)} are free"


def _size(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
