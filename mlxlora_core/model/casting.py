"""The types that tensors of a model are kept in, and the way from one into another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlxlora_core.errors import ModelError
from mlxlora_core.files.tensor_checks import is_finite, type_name
from mlxlora_core.values import LazyTensor

#: the type of each tensor in the checkpoint
STORED = "stored"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def cast(name: str, tensor: mx.array, dtype: mx.Dtype, where: Path) -> mx.array:
    """``tensor`` in another type.

    Raises:
        ModelError: a value that the type cannot hold, or that is not finite to begin with.
    """
    result = tensor.astype(dtype)
    if not is_finite(result):
        raise ModelError(
            f"{name} has values that are not finite as {type_name(dtype)}",
            where=where,
            fix="convert it with --dtype bfloat16 or float32, if the weights themselves are sound",
        )
    return result


def cast_on_reading(
    tensors: Mapping[str, LazyTensor], dtype: str, kept: Collection[str], where: Path
) -> dict[str, LazyTensor]:
    """Tensors that are in another type once they are read, and checked to be finite.

    Args:
        tensors: by name, as stored.
        dtype: a name in :data:`DTYPES`, or :data:`STORED` for the type that each has.
        kept: names of those that keep their type whatever ``dtype`` says.
        where: the model, for messages.
    """

    def read(name: str, tensor: LazyTensor, wanted: str) -> mx.array:
        array = tensor.read()
        floating = mx.issubdtype(array.dtype, mx.floating)
        return cast(name, array, getattr(mx, wanted), where) if floating else array

    made = {}
    for name, tensor in tensors.items():
        floating = mx.issubdtype(getattr(mx, tensor.dtype), mx.floating)
        wanted = dtype if dtype != STORED and floating and name not in kept else tensor.dtype
        made[name] = replace(tensor, dtype=wanted, read=partial(read, name, tensor, wanted))
    return made
