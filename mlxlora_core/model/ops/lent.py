"""What the operations on a CPU are built from: functions that runtimes have lent, or MLX's own."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx

from mlxlora_core.machine.device import lent
from mlxlora_core.runtime_started import LayerOperations

# exp of less than this is far below the last bit of any sum that contains a 1, and slow to compute.
_LOWEST = -80.0


def layers_for(x: mx.array) -> LayerOperations | None:
    """The layer operations that a runtime has lent, if they take arrays like ``x``."""
    layers: Any = lent("layers")
    return cast(LayerOperations, layers) if layers is not None and 0 < x.size < 2**31 else None


def lent_layers() -> LayerOperations:
    """The layer operations, when they are known to have been lent."""
    return cast(LayerOperations, lent("layers"))


def exp(x: mx.array) -> mx.array:
    """``exp(x)``; without a faster runtime, ``exp(-80)`` for anything below -80."""
    faster = lent("exp")
    if faster is not None:
        return cast(mx.array, faster(x))
    return mx.power(math.e, mx.maximum(x, _LOWEST))


def row_sums(x: mx.array) -> mx.array:
    """Sums over the last axis, which is kept with length 1."""
    return x @ mx.ones((x.shape[-1], 1))
