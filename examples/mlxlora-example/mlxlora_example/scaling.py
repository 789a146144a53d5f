"""A linear layer whose inputs are scaled by trained factors."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.ops import linear_shape


class ScaledLinear(nn.Module):
    """``y = linear(x · (1 + scale))``, of which only ``scale`` (inputs,) trains.

    It starts at zero, so that the start is the linear itself. Source: (IA)³,
    Liu et al. 2022, arXiv:2205.05638, section 3.3, which scales what goes into
    the second feed-forward layer like this.

    Args:
        linear: dense or quantized, with or without a bias; it is frozen.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        _, inputs = linear_shape(linear)
        self.linear = linear
        self.linear.freeze()
        self.scale = mx.zeros((inputs,))

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs)."""
        y: mx.array = self.linear(x * (1 + self.scale).astype(x.dtype))
        return y

    def fuse(self, weight: mx.array) -> mx.array:
        """The weight (outputs, inputs), float32, of one linear that does the same: its columns scaled."""
        return weight.astype(mx.float32) * (1 + self.scale)
