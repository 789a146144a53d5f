"""Quantizer ``affine``: groups of weights that share a scale and a bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxlora_core.api import PackedProduct, Quantizer, hookimpl, option

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class AffineOptions:
    """How many bits a weight takes, and how many weights share a scale."""

    group_size: int = option(
        64, help="weights that share one scale and bias", unit="weights", choices=(32, 64, 128)
    )
    bits: int = option(4, help="bits a weight", unit="bits", choices=(2, 3, 4, 5, 6, 8))


def quantize(weight: mx.array, options: AffineOptions) -> Mapping[str, mx.array] | None:
    """See :func:`mlxlora_affine.packing.pack`."""
    from mlxlora_affine.packing import pack

    return pack(weight, options)


def dequantize(parts: Mapping[str, mx.array], options: AffineOptions) -> mx.array:
    """See :func:`mlxlora_affine.packing.expand`."""
    from mlxlora_affine.packing import expand

    return expand(parts, options)


def matmul(x: mx.array, parts: Mapping[str, mx.array], options: AffineOptions) -> mx.array:
    """See :func:`mlxlora_affine.packing.multiply`."""
    from mlxlora_affine.packing import multiply

    return multiply(x, parts, options)


def bind(parts: Mapping[str, mx.array], options: AffineOptions) -> PackedProduct | None:
    """See :func:`mlxlora_affine.packing.bound`."""
    from mlxlora_affine.packing import bound

    return bound(parts, options)


@hookimpl
def mlxlora_quantizers() -> Iterable[Quantizer]:
    """The one quantizer of this plugin."""
    return [
        Quantizer(
            name="affine",
            summary="groups of weights that share a scale and a bias, 2 to 8 bits a weight",
            options=AffineOptions,
            parts=("weight", "scales", "biases"),
            quantize=quantize,
            dequantize=dequantize,
            matmul=matmul,
            bind=bind,
        )
    ]
