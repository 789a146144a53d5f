"""Quantizer ``affine``: groups of weights that share a scale and a bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxlora_core.api import Quantizer, QuantizerOptions, hookimpl, option

if TYPE_CHECKING:
    import mlx.nn as nn


@dataclass(frozen=True)
class AffineOptions(QuantizerOptions):
    """How many bits a weight takes, and how many weights share a scale."""

    group_size: int = option(
        64, help="weights that share one scale and bias", unit="weights", choices=(32, 64, 128)
    )
    bits: int = option(4, help="bits a weight", unit="bits", choices=(2, 3, 4, 5, 6, 8))


def quantize(linear: nn.Linear, options: AffineOptions) -> nn.Module | None:
    """See :meth:`mlxlora_affine.linear.AffineLinear.from_linear`."""
    from mlxlora_affine.linear import AffineLinear

    return AffineLinear.from_linear(linear, options.group_size, options.bits)


def restore(shape: tuple[int, int], bias: bool, options: AffineOptions) -> nn.Module:
    """See :class:`mlxlora_affine.linear.AffineLinear`."""
    from mlxlora_affine.linear import AffineLinear

    return AffineLinear(shape, bias, options.group_size, options.bits)


@hookimpl
def mlxlora_quantizers() -> Iterable[Quantizer]:
    """The one quantizer of this plugin."""
    summary = "groups of weights that share a scale and a bias, 2 to 8 bits a weight"
    return [
        Quantizer(name="affine", summary=summary, options=AffineOptions, quantize=quantize, restore=restore)
    ]
