"""The weight files of a model folder, read whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlxlora_core.errors import ModelError, SafetyError, listing
from mlxlora_core.files import tensor_file
from mlxlora_core.files.documents import read_json
from mlxlora_core.files.input_file import is_in_folder
from mlxlora_core.files.tensor_checks import type_name
from mlxlora_core.machine.memory import require_memory
from mlxlora_core.values import LazyTensor

WEIGHTS = {"safetensors": "model.safetensors", "npz": "weights.npz"}

#: what to do about weights that do not fit into memory
SMALLER = "use a smaller model, or fewer bits of it (--quantize)"

INDEX = "model.safetensors.index.json"

_INDEX_BYTES = 16 << 20


def read_weights(folder: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a model folder, all of which will be read and kept, and the digests of their contents.

    Raises:
        ModelError: no weights, a damaged file, or a shard that is absent.
        SafetyError: the index names a file outside the folder.
        ResourceError: they do not fit into memory.
    """
    # Before anything is read: where their digests are not kept, all tensors are read for them.
    sizes = (path.stat().st_size for path in weight_files(folder) if path.is_file())
    require_memory(sum(sizes), "the model", SMALLER)
    return _whole(folder, _opened)


def lazy_weights(folder: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a model folder, each read when asked for and kept nowhere, and their digests.

    Raises:
        ModelError: as :func:`read_weights`.
        SafetyError: as :func:`read_weights`.
    """
    return _whole(folder, tensor_file.lazy)


def _opened(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that is open until all of them are read."""
    tensors, _ = tensor_file.load(path)
    return {
        name: LazyTensor(tensor.shape, type_name(tensor.dtype), partial(_same, tensor))
        for name, tensor in tensors.items()
    }


def _same(tensor: mx.array) -> mx.array:
    return tensor


def _whole(
    folder: Path, read: Callable[[Path], dict[str, LazyTensor]]
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of all weight files, and the digests of their bytes, whatever the files state."""
    tensors: dict[str, LazyTensor] = {}
    digests: dict[str, str] = {}
    for path in weight_files(folder):
        part = read(path)
        twice = tensors.keys() & part.keys()
        if twice:
            raise ModelError(f"another shard holds {listing(sorted(twice))} too", where=path)
        tensors |= part
        digests |= tensor_file.digests(path)
    return tensors, digests


def weight_files(folder: Path) -> list[Path]:
    """The weight file, or the shards that the index names."""
    present = [path for name in WEIGHTS.values() if (path := folder / name).exists() or path.is_symlink()]
    if len(present) > 1:
        raise ModelError(f"there are both {listing(p.name for p in present)}", where=folder, fix="remove one")
    if present:
        return present
    index = folder / INDEX
    if not index.exists():
        raise ModelError(f"there are no weights ({listing(WEIGHTS.values())})", where=folder)
    try:
        names = set(read_json(index, _INDEX_BYTES)["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as fault:
        raise ModelError("is no index of shards", where=index) from fault
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError("is no index of shards: it names no files", where=index)
    shards = [folder / name for name in sorted(names)]
    outside = [name for name in sorted(names) if not is_in_folder(folder, name)]
    if outside:
        raise SafetyError(f"names shards outside its folder: {listing(outside)}", where=index)
    return shards
