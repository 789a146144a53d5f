"""Linear layers with a factor on each input, or on each output.

Source: Liu et al. 2022, arXiv:2205.05638, section 3.3. The factors start at 1.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.ops import linear_shape


class ScaledOutputs(nn.Module):
    """``y = ia3_l · linear(x)``, where the linear is frozen; a bias is scaled too.

    Args:
        linear: dense or quantized, with or without a bias.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.linear = linear
        self.linear.freeze()
        self.ia3_l = mx.ones((linear_shape(linear)[0],))

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type that the linear gives."""
        y: mx.array = self.linear(x)
        return (y * self.ia3_l).astype(y.dtype)

    def fuse(self, weight: mx.array) -> mx.array:
        """The weight (outputs, inputs), float32, of one linear that does what this module does."""
        return self.ia3_l[:, None] * weight

    def fuse_bias(self, bias: mx.array) -> mx.array:
        """The bias (outputs,) of that linear."""
        return self.ia3_l * bias


class ScaledInputs(nn.Module):
    """``y = linear(ia3_l · x)``, where the linear is frozen.

    Args:
        linear: dense or quantized, with or without a bias.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.linear = linear
        self.linear.freeze()
        self.ia3_l = mx.ones((linear_shape(linear)[1],))

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type that the linear gives."""
        y: mx.array = self.linear((x * self.ia3_l).astype(x.dtype))
        return y

    def fuse(self, weight: mx.array) -> mx.array:
        """The weight (outputs, inputs), float32, of one linear that does what this module does."""
        return weight * self.ia3_l

    def fuse_bias(self, bias: mx.array) -> mx.array:
        """The bias (outputs,) of that linear: the same."""
        return bias
