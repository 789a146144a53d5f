"""Disk and memory: how much work will need, how much is free, and what it looks like to run out.

Before long work both figures are said, and work that cannot end well is refused
before it has written anything.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlxlora_core.errors import ResourceError
from mlxlora_core.limits import free_memory_bytes

if TYPE_CHECKING:
    from mlxlora_core.data import Examples
    from mlxlora_core.model_folder import Model

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

_OPTIMIZER_BYTES = 16  # a weight, its gradient and two moments, each float32
_HEAD_WIDTH = 64  # of attention, where a model does not tell: few are narrower


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


def training_bytes(model: Model, rows: Examples, batch_size: int) -> int:
    """An estimate of what training will take beyond what is loaded, in bytes; right within a factor of 2.

    For each token of the longest batch, what goes into and comes out of every
    linear from the lowest adapted layer up, three logits a word, and the scores
    of attention, all float32; for each weight of the adapter the optimizer's
    numbers.
    """
    from mlxlora_core.adapter_file import trainable
    from mlxlora_core.layers import linear_shape
    from mlxlora_core.model_folder import linears

    adapter = trainable(model.module)
    trained = {layer for name in adapter if (layer := _layer(name)) is not None}
    count = len(model.language_model.layers)
    first = min(trained, default=count)
    shapes = [(_layer(path), linear_shape(linear)) for path, linear in linears(model.module)]
    width = sum(sum(shape) for layer, shape in shapes if layer is not None and layer >= first)
    longest = max(len(example.tokens) for example in rows.examples)
    batch = min(batch_size, len(rows))
    heads = max(1, min(shape[1] for _, shape in shapes) // _HEAD_WIDTH)
    scores = batch * longest**2 * heads * (count - first)
    logits = 3 * model.language_model.vocab_size
    tokens = batch * longest * (width + logits)
    return 4 * (tokens + scores) + _OPTIMIZER_BYTES * sum(tensor.size for tensor in adapter.values())


@contextmanager
def training_memory(model: Model, rows: Examples, batch_size: int) -> Iterator[str]:
    """Refuse training that does not fit into memory; the value is what it needs, in words.

    Raises:
        ResourceError: too little is free, or there turns out to be too little.
    """
    fix = "lower --batch-size, --max-seq-length or --lora-layers"
    need = training_bytes(model, rows, batch_size)
    said = require_memory(need, "training", fix)
    try:
        yield said
    except (MemoryError, RuntimeError) as fault:
        if exhausted(fault) is None:
            raise
        raise ResourceError(f"there is not enough memory although {said}: {fault}", fix=fix) from fault


def _size(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _layer(path: str) -> int | None:
    """Which layer a parameter or linear is in."""
    parts = path.split(".")
    return int(parts[1]) if parts[0] == "layers" and len(parts) > 1 and parts[1].isdecimal() else None
