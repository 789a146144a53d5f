"""Reads the tensors of checked ``.pth`` files with torch, in memory that does not grow.

Of a file only the pages of one tensor are mapped, and given up with it: pages
of a mapping that were touched count as memory in use.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import mlx.core as mx

from mlxlora_core.api import ModelError, PluginError, ResourceError, free_in_groups_bytes, listing
from mlxlora_torch.archive import ITEM_BYTES, Archive
from mlxlora_torch.shards import Joined

if TYPE_CHECKING:
    import torch

#: older ones can be made to run code by a .pth (CVE-2025-32434, CVE-2026-24747)
OLDEST_TORCH = (2, 10)
#: memory that torch takes when it is imported: 210 MB with torch 2.13
_TORCH_BYTES = 220 << 20
#: what the loader of libraries says when memory is short
_NO_ROOM = ("failed to map segment", "annot allocate memory")


def need_torch() -> None:
    """Import torch.

    Raises:
        PluginError: it is not installed, cannot be imported or is too old to be safe.
        ResourceError: it does not fit into the memory that this process may take.
    """
    fix = "pip install 'mlxlora[torch]'"
    free = free_in_groups_bytes()
    if free is not None and free < _TORCH_BYTES and "torch" not in sys.modules:
        raise ResourceError(
            f"there is no memory for torch, which .pth files need ({_TORCH_BYTES >> 20} MB, {free >> 20} MB "
            "are free)",
            fix="allow the control group of this process more",
        )
    try:
        import torch
    except (ImportError, OSError, MemoryError) as fault:
        if isinstance(fault, MemoryError) or any(words in str(fault) for words in _NO_ROOM):
            raise ResourceError(
                f"there is no memory for torch, which .pth files need ({fault})", fix="raise ulimit -v"
            ) from None
        what = f"reading .pth files needs torch, which cannot be imported ({fault})"
        raise PluginError(what, fix=fix) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        what = f"torch {torch.__version__} is not safe for .pth files, wanted {wanted} or newer"
        raise PluginError(what, fix=fix)


class Reader:
    """The tensors of one checkpoint.

    Args:
        shards: its files, checked, by number.
    """

    def __init__(self, shards: Sequence[Archive]) -> None:
        self._shards = shards
        self._checked: set[tuple[int, str]] = set()

    def read(self, tensor: Joined) -> mx.array:
        """A whole tensor, exactly as stored.

        Raises:
            ModelError: its bytes differ from their checksum, it has NaN or
                infinite values, or its file is not what it was.
            ResourceError: there is no memory to map it.
        """
        whole = self._part(0, tensor.name) if tensor.axis is None else self._concatenate(tensor)
        count = _count_nonfinite(whole)
        if count:
            where = self._shards[0].path if len(self._shards) == 1 else self._shards[0].path.parent
            raise ModelError(f"{tensor.name} has {count} values that are NaN or infinite", where=where)
        return _to_mlx(whole)

    def check_shards(self, tensors: Sequence[Joined]) -> None:
        """Compare the shards with each other.

        Raises:
            ModelError: what each shard should hold whole differs (all listed),
                or two shards hold the same parts.
        """
        folder = self._shards[0].path.parent
        whole = [tensor.name for tensor in tensors if tensor.axis is None]
        others = range(1, len(self._shards))
        differing = [name for name in whole if any(not self._equal(name, 0, other) for other in others)]
        if differing:
            raise ModelError(
                f"{listing(differing)} should be the same in all shards and is not: "
                "shards of different models",
                where=folder,
                fix="put all shards of one download there, and nothing else",
            )
        # Smallest first: in good shards the first comparison ends it.
        parts = sorted((t for t in tensors if t.axis is not None), key=lambda t: math.prod(t.shape))
        for one, other in combinations(range(len(self._shards)), 2):
            if parts and all(self._equal(tensor.name, one, other) for tensor in parts):
                names = f"{self._shards[one].path.name} and {self._shards[other].path.name}"
                raise ModelError(
                    f"{names} hold the same weights", where=folder, fix="download the shards again"
                )

    def _concatenate(self, tensor: Joined) -> torch.Tensor:
        """The parts of a tensor side by side; one part is mapped at a time."""
        import torch

        axis = tensor.axis or 0
        whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        size = tensor.shape[axis] // len(self._shards)
        for number in range(len(self._shards)):
            whole.narrow(axis, number * size, size).copy_(self._part(number, tensor.name))
        return whole

    def _equal(self, name: str, one: int, other: int) -> bool:
        """Whether a tensor has the same bits in two shards."""
        import torch

        return torch.equal(_bits(self._part(one, name)), _bits(self._part(other, name)))

    def _part(self, number: int, name: str) -> torch.Tensor:
        """A tensor of one shard, mapped for as long as it is kept."""
        import torch

        archive = self._shards[number]
        stored = archive.tensors[name]
        dtype = getattr(torch, stored.dtype)
        with archive.open() as file:
            if (number, stored.storage.key) not in self._checked:
                archive.check_bytes(file, stored.storage.key)
                self._checked.add((number, stored.storage.key))
            if not stored.span:
                return torch.empty(stored.shape, dtype=dtype)
            start, length = archive.position(name), stored.span * ITEM_BYTES[stored.dtype]
            pages, before = _map(file, start, length, archive.path)
        flat = torch.frombuffer(pages, dtype=dtype, count=stored.span, offset=before)
        return flat.as_strided(stored.shape, stored.stride)


def _map(file: BinaryIO, start: int, length: int, path: Path) -> tuple[mmap.mmap, int]:
    """The pages in which some bytes of a file lie, and how many bytes of them lie before."""
    before = start % mmap.ALLOCATIONGRANULARITY
    try:
        # Writable, which is all that torch takes, and its own: the file is never written.
        access = mmap.ACCESS_COPY
        return mmap.mmap(file.fileno(), before + length, access=access, offset=start - before), before
    except OSError as fault:
        what = f"{length} bytes of it cannot be mapped: {fault.strerror}"
        raise ResourceError(what, where=path) from None


def _count_nonfinite(tensor: torch.Tensor) -> int:
    """How many values are NaN or infinite; smallest and largest tell quickly that none is."""
    import torch

    if not tensor.numel() or all(torch.isfinite(value) for value in tensor.aminmax()):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The values as integers of the same width."""
    import torch

    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _to_mlx(tensor: torch.Tensor) -> mx.array:
    """A copy as an array of the same dtype; numpy has no bfloat16, so its bits go over."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())
