"""The files of the ``npz`` exporter."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import mlx.core as mx

from mlxlora_core.api import ExportSource, LazyTensor, ModelError, listing
from mlxlora_core.files import copy_file, save_tensors, write_json

_TYPES = {"float16": mx.float16, "float32": mx.float32}


def write(source: ExportSource, target: Path, dtype: str) -> None:
    """Write all of them into ``target``; see :func:`mlxlora_npz.export`."""
    tensors = dict(source.tensors)
    if dtype != "stored":
        tensors = {name: _as_type(name, tensor, dtype) for name, tensor in tensors.items()}
    refused = [name for name, tensor in tensors.items() if tensor.dtype == "bfloat16"]
    if refused:
        raise ModelError(
            f"{len(refused)} tensors are bfloat16, which .npz cannot hold: {listing(refused, 3)}",
            fix="add --set export.dtype=float16, or float32",
        )
    save_tensors(target / "weights.npz", tensors)
    write_json(target / "config.json", dict(source.config))
    for name, path in source.tokenizer.items():
        copy_file(path, target / name)
    if source.adapter is not None:
        held = source.adapter.tensors
        trained = {
            name: _as_type(name, t, "float32") if t.dtype == "bfloat16" else t for name, t in held.items()
        }
        save_tensors(target / "adapters.npz", trained, source.adapter.metadata)


def _as_type(name: str, tensor: LazyTensor, dtype: str) -> LazyTensor:
    """``tensor`` in another type."""
    return LazyTensor(tensor.shape, dtype, partial(_cast, name, tensor, dtype))


def _cast(name: str, tensor: LazyTensor, dtype: str) -> mx.array:
    value = tensor.read().astype(_TYPES[dtype])
    if not mx.isfinite(value).all().item():
        raise ModelError(f"{name} has values that {dtype} cannot hold", fix="add --set export.dtype=float32")
    return value
