"""What an adapter may be asked to wrap, for the suite of adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.model.linears import QuantizedEmbedding, QuantizedLinear
from mlxlora_core.options import NoOptions
from mlxlora_core.specs import Quantizer
from mlxlora_core.testing.stand_in import ROUNDING, ROUNDING_ROWS, choice

OUTPUTS, INPUTS, WORDS = 32, 64, 50


def dense(bias: bool = False, dtype: mx.Dtype = mx.float32) -> nn.Linear:
    """A dense linear (outputs, inputs), its weights drawn by MLX's seed."""
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    linear.set_dtype(dtype)
    return linear


def _packed(
    kind: type[QuantizedLinear | QuantizedEmbedding], quantizer: Quantizer, weight: mx.array
) -> nn.Module:
    parts = quantizer.quantize(weight, NoOptions())
    assert parts is not None
    return kind(choice("quantizer", quantizer, NoOptions()), parts, weight.shape)


#: what an adapter may be asked to wrap
LINEARS: Mapping[str, Callable[[], nn.Module]] = {
    "dense": dense,
    "dense with bias": lambda: dense(bias=True),
    "dense float16": lambda: dense(dtype=mx.float16),
    "4 bits of MLX": lambda: nn.QuantizedLinear.from_linear(dense(), 32, 4),
    "3 bits of MLX with bias": lambda: nn.QuantizedLinear.from_linear(dense(bias=True), 64, 3),
    "of a quantizer": lambda: _packed(QuantizedLinear, ROUNDING, dense().weight),
}


def _embedding(dtype: mx.Dtype = mx.float32) -> nn.Embedding:
    embedding = nn.Embedding(WORDS, INPUTS)
    embedding.set_dtype(dtype)
    return embedding


EMBEDDINGS: Mapping[str, Callable[[], nn.Module]] = {
    "dense": _embedding,
    "dense float16": lambda: _embedding(mx.float16),
    "of a quantizer": lambda: _packed(QuantizedEmbedding, ROUNDING_ROWS, _embedding().weight),
}
