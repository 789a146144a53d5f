"""How it shows when memory, disk or another limit runs out."""

from __future__ import annotations

import errno
import os

from mlxlora_core.errors import ResourceError, UsageError
from mlxlora_core.path_text import too_long

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
    errno.EAGAIN,
    errno.ENOLCK,
    errno.ENOBUFS,
    errno.ELOOP,
}

#: what MLX says, on any backend, and what PyTorch, NumPy, C++ and the loader of libraries say without memory
_NO_MEMORY = (
    "unable to allocate",
    "out of memory",
    "insufficient memory",
    "not enough memory",
    "maximum allowed buffer size",
    "can't allocate",
    "cannot allocate",
    "could not allocate",
    "failed to allocate",
    "bad_alloc",
    "failed to map segment",
    "can't start new thread",
)

#: what MLX says when a GPU gives up
_NO_GPU = ("command buffer execution failed", "cuda error", "gpu timeout")


def exhausted(fault: BaseException) -> ResourceError | UsageError | None:
    """The error that a fault of disk, memory, GPU or a limit is for the user; None for any other fault.

    A name that is too long is the fault of whoever gave it.
    """
    said = _said(fault)
    if isinstance(fault, MemoryError) or _tells(fault, said, _NO_MEMORY):
        return ResourceError(
            f"there is not enough memory{f': {said}' if said else ''}",
            fix="use a smaller model, smaller batches or shorter rows",
        )
    if isinstance(fault, RuntimeError) and _tells(fault, said, _NO_GPU):
        return ResourceError(f"the GPU gave up: {fault}", fix="give the same command again")
    if not isinstance(fault, OSError):
        return None
    where = os.fsdecode(fault.filename) if isinstance(fault.filename, (str, bytes)) else ""
    if fault.errno in LIMITS:
        return ResourceError(str(fault.strerror), where=where, fix="free it, raise the limit or name another")
    return too_long(fault, where)


def _said(fault: BaseException) -> str:
    """What an exception says, even one that fails when it is asked."""
    try:
        return str(fault)
    except Exception:
        return ""


def _tells(fault: BaseException, said: str, words: tuple[str, ...]) -> bool:
    """Whether a library says one of ``words``: as RuntimeError, and as ImportError while it is loaded."""
    return isinstance(fault, (RuntimeError, ImportError)) and any(word in said.lower() for word in words)


def readable_bytes(count: int) -> str:
    """``count`` bytes for a person: ``2.50 GB``, ``0.31 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
