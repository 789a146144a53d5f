"""What it looks like to run out of memory, disk or another limit."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

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

#: what the dynamic linker says when it gets no memory for a library
_NO_LIBRARY = ("failed to map segment", "cannot allocate memory")

#: what MLX says when a GPU gives up
_NO_GPU = ("command buffer execution failed", "cuda error", "gpu timeout")


def exhausted(fault: BaseException) -> ResourceError | None:
    """The error that a fault of disk, memory, GPU or a limit is for the user; None for any other fault."""
    if (
        isinstance(fault, MemoryError)
        or (isinstance(fault, RuntimeError) and _says(fault, _NO_MEMORY))
        or (isinstance(fault, ImportError) and _says(fault, _NO_LIBRARY))
    ):
        return ResourceError(
            f"there is not enough memory{f': {fault}' if str(fault) else ''}",
            fix="use a smaller model, smaller batches or shorter rows",
        )
    if isinstance(fault, RuntimeError) and _says(fault, _NO_GPU):
        return ResourceError(f"the GPU gave up: {fault}", fix="give the same command again")
    if isinstance(fault, OSError) and fault.errno in LIMITS:
        where = os.fsdecode(fault.filename) if isinstance(fault.filename, (str, bytes)) else ""
        return ResourceError(str(fault.strerror), where=where, fix="free it, raise the limit or name another")
    return None


def _says(fault: BaseException, words: Iterable[str]) -> bool:
    """Whether a fault says any of these words."""
    said = str(fault).lower()
    return any(text in said for text in words)


def readable_bytes(count: int) -> str:
    """``count`` bytes for a person: ``2.50 GB``, ``0.31 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
