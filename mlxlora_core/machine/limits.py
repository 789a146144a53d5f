"""What it looks like to run out of memory, disk or another limit."""

from __future__ import annotations

import errno
import os

from mlxlora_core.errors import ResourceError

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


def readable_bytes(count: int) -> str:
    """``count`` bytes for a person: ``2.50 GB``, ``0.31 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
