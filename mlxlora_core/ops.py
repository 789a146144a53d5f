"""The maths that plugins may use: MLX's own operations where they are fast, ours where they are not.

Heavy: take it inside the function that uses it, or in a module that only such functions import.
"""

from mlxlora_core.machine.device import on_cpu, on_cuda, packed_product
from mlxlora_core.model.cache import KVCache
from mlxlora_core.model.dropout import Dropout
from mlxlora_core.model.foreign_updates import updates_there, vectors_there
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.layers import GatedFeedForward, RMSNorm
from mlxlora_core.model.linears import StackedLinear, dense_weight, linear_shape
from mlxlora_core.model.ops import (
    attend,
    attention,
    attention_mask,
    gelu_times,
    positions,
    rms_norm,
    rotate,
    silu_times,
)
from mlxlora_core.model.ops.ragged import Positions
from mlxlora_core.model.ops.rows import Mask, Rows

__all__ = [
    "Dropout",
    "GatedFeedForward",
    "KVCache",
    "LanguageModel",
    "Mask",
    "Positions",
    "RMSNorm",
    "Rows",
    "StackedLinear",
    "attend",
    "attention",
    "attention_mask",
    "dense_weight",
    "gelu_times",
    "linear_shape",
    "on_cpu",
    "on_cuda",
    "packed_product",
    "positions",
    "rms_norm",
    "rotate",
    "silu_times",
    "updates_there",
    "vectors_there",
]
