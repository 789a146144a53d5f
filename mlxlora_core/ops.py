"""The maths that plugins may use: MLX's own operations where they are fast, ours where they are not.

Heavy: take it inside the function that uses it, or in a module that only such functions import.
"""

from mlxlora_core.machine.device import on_cpu, on_cuda
from mlxlora_core.model.cache import KVCache
from mlxlora_core.model.linears import StackedLinear, dense_weight, linear_shape
from mlxlora_core.model.ops import attention, rms_norm, rotate, silu_times

__all__ = [
    "KVCache",
    "StackedLinear",
    "attention",
    "dense_weight",
    "linear_shape",
    "on_cpu",
    "on_cuda",
    "rms_norm",
    "rotate",
    "silu_times",
]
