"""What the operations on a CPU are built from: functions that runtimes have lent, or MLX's own."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx

from mlxlora_core.machine.device import lent
from mlxlora_core.runtime_started import LayerOperations

# e to less than this is far below the last bit of any sum with a 1 in it, and slow to compute.
_LOWEST = -80.0


def layers_for(x: mx.array) -> LayerOperations | None:
    """What a runtime has lent for arrays such as ``x``, if anything."""
    layers: Any = lent("layers")
    return cast(LayerOperations, layers) if layers is not None and 0 < x.size < 2**31 else None


def lent_layers() -> LayerOperations:
    """The same where it is known that there is something."""
    return cast(LayerOperations, lent("layers"))


def exp(x: mx.array) -> mx.array:
    """``exp(x)``, but ``exp(-80)`` below that, where nothing faster is at hand."""
    faster = lent("exp")
    if faster is not None:
        return cast(mx.array, faster(x))
    return mx.power(math.e, mx.maximum(x, _LOWEST))


def row_sums(x: mx.array) -> mx.array:
    """Sums over the last axis, which stays with length 1."""
    return x @ mx.ones((x.shape[-1], 1))
