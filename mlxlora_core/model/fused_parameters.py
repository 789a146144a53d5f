"""The parameters of a linear with an adapter fused into them, as the adapter computes them, checked."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.files.tensor_checks import is_finite, type_name
from mlxlora_core.plugins import Component


def fused_weight(component: Component, wrapped: nn.Module, before: mx.array) -> mx.array:
    """The weight of a linear with the adapter fused into it, as the adapter computes it.

    Args:
        component: the adapter.
        wrapped: the linear with the adapter on it.
        before: the linear's own weight, float32.

    Raises:
        PluginError: the result has another shape or type, or values that are not finite.
    """
    weight = component.checked("fuse", component.spec.fuse(wrapped, before), mx.array)
    if weight.shape != before.shape or weight.dtype != mx.float32:
        got = f"{weight.shape} {type_name(weight.dtype)}"
        raise component.breach("fuse", got, f"{before.shape} float32")
    if not is_finite(weight):
        raise component.breach("fuse", "values that are not finite", "finite ones")
    return weight


def fused_bias(component: Component, wrapped: nn.Module, before: mx.array) -> mx.array:
    """The bias that goes with a :func:`fused_weight`, in the type of the one before.

    Args:
        component: the adapter.
        wrapped: the linear with the adapter on it.
        before: the linear's own bias.

    Raises:
        PluginError: the result has another shape, or values that are not finite.
    """
    if component.spec.fuse_bias is None:
        return before
    given = component.spec.fuse_bias(wrapped, before.astype(mx.float32))
    bias = component.checked("fuse_bias", given, mx.array).astype(before.dtype)
    if bias.shape != before.shape or not is_finite(bias):
        got = f"{bias.shape}" if bias.shape != before.shape else "values that are not finite"
        raise component.breach("fuse_bias", got, f"{before.shape} finite values")
    return bias
