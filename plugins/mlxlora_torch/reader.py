"""Reads the tensors of checked ``.pth`` files with torch, in memory that does not grow.

A file is mapped and not loaded, but pages of a mapping that were touched count
as memory in use. So the mappings are given up after every so many bytes, and
made anew when the next tensor is wanted.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlora_core.api import ModelError, PluginError, SafetyError, listing
from mlxlora_torch.archive import ITEM_BYTES, Archive
from mlxlora_torch.shards import Joined

if TYPE_CHECKING:
    import torch

#: mapped bytes that may be touched before all mappings are given up
MAPPED_LIMIT_BYTES = 64 << 20

#: older ones can be made to run code in spite of weights_only (CVE-2025-32434, CVE-2026-24747)
OLDEST_TORCH = (2, 10)


def need_torch() -> None:
    """Import torch.

    Raises:
        PluginError: it is not installed, cannot be imported or is too old to be safe.
    """
    fix = "pip install 'mlxlora[torch]'"
    try:
        import torch
    except (ImportError, OSError) as fault:
        raise PluginError(
            f"reading .pth files needs torch, which cannot be imported ({fault})", fix=fix
        ) from None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise PluginError(
            f"torch {torch.__version__} is not safe for .pth files, wanted {oldest} or newer", fix=fix
        )


class Reader:
    """The tensors of one checkpoint.

    Args:
        shards: its files, checked, by number.
    """

    def __init__(self, shards: Sequence[Archive]) -> None:
        self._shards = shards
        self._mapped: dict[int, dict[str, torch.Tensor]] = {}
        self._touched_bytes = 0
        self._checked: set[tuple[int, str]] = set()

    def read(self, tensor: Joined) -> mx.array:
        """A whole tensor, exactly as stored.

        Raises:
            ModelError: its bytes differ from their checksum, it has NaN or
                infinite values, or its file is not what it was.
        """
        whole = self._part(0, tensor.name) if tensor.axis is None else self._concatenate(tensor)
        count = _count_nonfinite(whole)
        if count:
            where = self._shards[0].path if len(self._shards) == 1 else self._shards[0].path.parent
            raise ModelError(f"{tensor.name} has {count} values that are NaN or infinite", where=where)
        array = _to_mlx(whole)
        del whole
        self._release()
        return array

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

        # A copy of the first: getting the second may give up the mapping of the first.
        first = _bits(self._part(one, name)).clone()
        return torch.equal(first, _bits(self._part(other, name)))

    def _part(self, number: int, name: str) -> torch.Tensor:
        """A tensor of one shard, mapped. It is good until the next call: keep no reference to it."""
        archive = self._shards[number]
        archive.check_unchanged()  # a mapping of a file that was cut would end the process
        stored = archive.tensors[name]
        if (number, stored.storage.key) not in self._checked:
            archive.check_bytes(stored.storage.key)
            self._checked.add((number, stored.storage.key))
        self._release()
        if number not in self._mapped:
            self._mapped[number] = _map(archive)
        self._touched_bytes += stored.span * ITEM_BYTES[stored.dtype]
        return self._mapped[number][name].detach()

    def _release(self) -> None:
        """Give up the mappings once enough of their pages were touched."""
        if self._touched_bytes > MAPPED_LIMIT_BYTES:
            self._mapped.clear()
            self._touched_bytes = 0


def _map(archive: Archive) -> dict[str, torch.Tensor]:
    """The tensors of a file, as views of a mapping of it.

    Raises:
        SafetyError: torch's safe reader refuses the file, or finds other tensors than were checked.
        ModelError: torch cannot read it, or the file changed.
    """
    import torch

    try:
        tensors = torch.load(str(archive.path), map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # whose text recommends to load without care
        raise SafetyError("torch's safe reader refuses its pickle", where=archive.path) from None
    except Exception as fault:  # a damaged file can bring out any
        raise ModelError(f"torch cannot read it ({_first_line(fault)})", where=archive.path) from None
    archive.check_unchanged()
    if _layout(tensors) != {
        name: (t.dtype, t.offset, t.shape, t.stride) for name, t in archive.tensors.items()
    }:
        raise SafetyError("torch finds other tensors in it than its table says", where=archive.path)
    found: dict[str, torch.Tensor] = tensors
    return found


def _layout(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """name -> (dtype, offset, shape, stride), as torch has them."""
    return {
        name: (str(t.dtype).removeprefix("torch."), t.storage_offset(), tuple(t.shape), t.stride())
        for name, t in tensors.items()
    }


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


def _first_line(fault: Exception) -> str:
    return str(fault).strip().split("\n", 1)[0][:200]
