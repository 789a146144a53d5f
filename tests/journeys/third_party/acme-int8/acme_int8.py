"""Weights as 8-bit whole numbers, with one scale for each row of each expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxlora_core.api import ModelError, Quantizer, hookimpl, option

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class Int8Options:
    """Which weights are worth it."""

    experts_only: bool = option(False, help="leave all but stacked linears as they are")
    min_inputs: int = option(8, help="leave rows that are shorter as they are", minimum=8)


def quantize(weight: mx.array, options: Int8Options) -> dict[str, mx.array] | None:
    """``values`` int8 in the shape of the weight, and ``scale`` float32 without its last axis."""
    import mlx.core as mx

    if weight.shape[-1] < options.min_inputs or (options.experts_only and weight.ndim == 2):
        return None
    exact = weight.astype(mx.float32)
    largest = mx.abs(exact).max(axis=-1)
    if not mx.isfinite(largest).all().item():
        raise ModelError("a weight is not finite")
    scale = largest / 127
    steps = mx.where(scale[..., None] > 0, exact / scale[..., None], 0)
    return {"values": mx.clip(mx.round(steps), -127, 127).astype(mx.int8), "scale": scale}


def dequantize(parts: Mapping[str, mx.array], options: Int8Options) -> mx.array:
    """The weight, float32."""
    import mlx.core as mx

    if parts["values"].shape[:-1] != parts["scale"].shape:
        raise ModelError(f"values {parts['values'].shape} do not go with scale {parts['scale'].shape}")
    return parts["values"].astype(mx.float32) * parts["scale"].astype(mx.float32)[..., None]


def matmul(x: mx.array, parts: Mapping[str, mx.array], options: Int8Options) -> mx.array:
    """Multiply by the whole numbers first and scale the outputs."""
    import mlx.core as mx

    product = x.astype(mx.float32) @ parts["values"].astype(mx.float32).T
    return (product * parts["scale"].astype(mx.float32)).astype(x.dtype)


@hookimpl
def mlxlora_quantizers() -> Iterable[Quantizer]:
    """The quantizer."""
    return [
        Quantizer(
            name="int8",
            summary="8-bit whole numbers, one scale a row",
            options=Int8Options,
            parts=("values", "scale"),
            quantize=quantize,
            dequantize=dequantize,
            matmul=matmul,
        )
    ]
