"""A linear layer whose weight is taken apart into magnitude and direction."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.ops import dense_weight
from mlxlora_lora.linear import LoRALinear


class DoRALinear(LoRALinear):
    """``y = m / ‖V‖ · (W x + scale · (dropout(x) @ lora_a) @ lora_b) + bias``, with frozen W.

    V = W + scale · (lora_a @ lora_b)ᵀ, ‖V‖ is the norm of each of its rows, and the gradient does
    not go through it. ``m`` (outputs,) starts at ‖W‖, so that the start is the linear itself.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5, with the gradient of section 4.3.

    The arguments are those of :class:`LoRALinear`.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear, rank, scale, dropout)
        # Of W alone; not a parameter, for whoever opens an adapter file has W.
        self._squares = dense_weight(linear).astype(mx.float32).square().sum(axis=1)
        self.m = mx.sqrt(self._squares)

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type that the linear gives."""
        y: mx.array = self.linear(x)
        bias = self.linear.bias if "bias" in self.linear else 0.0
        inner = self.dropout(x) @ self.lora_a.astype(x.dtype)
        update = mx.addmm(y - bias, inner, self.lora_b.astype(x.dtype), alpha=self.scale)
        return (self._ratio(x.dtype) * update + bias).astype(y.dtype)

    def _ratio(self, dtype: mx.Dtype) -> mx.array:
        """``m / ‖V‖`` (outputs,), float32, without V itself.

        ‖W + s B A‖² = ‖W‖² + 2 s (B · W A) + s² (B · A A B), row by row: R rows through the linear,
        in the type that it multiplies in, instead of a second weight.
        """
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        rows = self.linear(a.T.astype(dtype)) - (
            self.linear.bias if "bias" in self.linear else 0.0
        )  # (R, outputs)
        mixed = 2 * self.scale * (b * rows.astype(mx.float32)).sum(axis=0)
        square = self.scale**2 * (b * ((a.T @ a) @ b)).sum(axis=0)
        norm = mx.stop_gradient(mx.sqrt(mx.maximum(self._squares + mixed + square, 0.0)))
        return self.m / mx.maximum(norm, _LEAST)

    def fuse(self, weight: mx.array) -> mx.array:
        """The weight (outputs, inputs), float32, of one linear that does what this module does.

        Args:
            weight: of the linear inside, (outputs, inputs).
        """
        changed = super().fuse(weight)
        norm = mx.linalg.norm(changed, axis=1)
        return (self.m / mx.maximum(norm, _LEAST))[:, None] * changed


_LEAST = 1e-30  # a row of zeros has no direction, and stays one
