"""Exporter ``gguf-lora``: an adapter as the file that llama.cpp puts on a model that is not changed.

The file: ``src/llama-adapter.cpp`` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlxlora_core.api import ExportAdapter, ExportSource, LazyTensor, LowRank, ModelError, listing
from mlxlora_core.ops import updates_there
from mlxlora_gguf.contents import Cost, out_tensor
from mlxlora_gguf.lora import ALPHA, EMBEDDING, KIND, LORA, LORA_A, LORA_B, TYPE
from mlxlora_gguf.model_export import MARK, named
from mlxlora_gguf.writing import OutTensor, Value, write_gguf

_ARCHITECTURE = "general.architecture"
_FILE = "adapter.gguf"
_FUSE = "fuse the adapter into a model: export --to gguf"


def export_adapter(source: ExportSource, target: Path, kind: str) -> list[str]:
    """Write ``adapter.gguf`` into a folder.

    Args:
        source: with the adapter, its linears placed as GGUF names them.
        target: folder.
        kind: type of the tensors, ``F32`` or ``F16``.

    Returns:
        What is not as it is in mlxlora, a sentence each.

    Raises:
        ModelError: an adapter that is more than a low-rank update of linears.
        ResourceError: the disk is full.
    """
    adapter = source.adapter
    assert adapter is not None, "this exporter takes an adapter"
    _refuse_others(adapter)
    updates = updates_there(adapter, adapter.low_rank)
    alpha = next((u.scale * u.a.shape[1] for u in updates.values() if u.scale), 1.0)
    cost = Cost()
    tensors = [t for name, u in updates.items() for t in _pair(f"{name}.weight", u, alpha, kind, cost)]
    keys: dict[str, Value] = {
        _ARCHITECTURE: source.config[_ARCHITECTURE],
        TYPE: "adapter",
        **named(source, "general.base_model.0.name"),
        MARK: 1,
        KIND: LORA,
        ALPHA: float(alpha),
    }
    keys |= {"general.base_model.count": 1} if source.base else {}
    write_gguf(target / _FILE, keys, tensors)
    return list(cost.notes())


def _refuse_others(adapter: ExportAdapter) -> None:
    """Refuse what llama.cpp has no place for."""
    kind = adapter.name.rpartition(":")[2]
    other = [path for path in adapter.paths if path not in adapter.low_rank]
    if other:
        what = (
            f"adapter '{kind}' is no low-rank update alone ({listing(other, 2)}), and llama.cpp has no other"
        )
        raise ModelError(what, fix=_FUSE)
    held = [path for path in adapter.paths if adapter.places[path].foreign == EMBEDDING]
    if held:
        what = f"{listing(held)} is an embedding, and llama.cpp may take its update for the output head's too"
        raise ModelError(what, fix=_FUSE)


def _pair(name: str, update: LowRank, alpha: float, kind: str, cost: Cost) -> Iterator[OutTensor]:
    """Both matrices of an update, turned round; llama.cpp multiplies by alpha over the rank."""
    by = update.scale * update.a.shape[1] / alpha  # 1 where all linears have one scale and rank
    matrices: Mapping[str, mx.array] = {
        LORA_A: update.a.T,
        LORA_B: (update.b if by == 1 else update.b.astype(mx.float32) * by).T,
    }
    for ending, matrix in matrices.items():
        held = LazyTensor(matrix.shape, "float32", partial(_read, matrix))
        yield out_tensor(name + ending, held, kind, cost)


def _read(matrix: mx.array) -> mx.array:
    return mx.contiguous(matrix.astype(mx.float32))
