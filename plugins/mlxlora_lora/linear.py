"""A linear layer with a low-rank update beside it."""

from __future__ import annotations

from typing import Self

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.api import LowRank, UsageError
from mlxlora_core.ops import Dropout, linear_shape


class LoRALinear(nn.Module):
    """``y = linear(x) + scale · (dropout(x) @ lora_a) @ lora_b``, where the linear is frozen.

    ``lora_a`` (inputs, R) starts uniform in ±1/sqrt(inputs) and ``lora_b`` (R,
    outputs) at zero, so that the start is the linear itself. Both are float32, and
    multiply in the type of ``x``.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3, with ``scale`` for its
    alpha / R.

    Args:
        linear: dense or quantized, with or without a bias; it is frozen.
        rank: R.
        scale: factor on the update.
        dropout: share of ``x`` dropped on the way into the update while training.

    Raises:
        UsageError: a rank below 1, or above what the shape of the linear can have.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        outputs, inputs = linear_shape(linear)
        check_rank(rank, inputs, outputs)
        edge = inputs**-0.5
        self.linear = linear
        self.linear.freeze()
        self.scale = scale
        self.dropout = Dropout(dropout)
        self.lora_a = mx.random.uniform(-edge, edge, (inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int = 8, scale: float = 2.0, dropout: float = 0.0) -> Self:
        """A drop-in for ``linear``; the arguments are those of the class."""
        return cls(linear, rank, scale, dropout)

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type that the linear gives."""
        y: mx.array = self.linear(x)
        # From the left: (x @ a) @ b costs R (inputs + outputs) products a row, x @ (a @ b) all of them.
        # In the type of x: in float32, a copy of x and one of y would be made and kept for the gradient.
        inner = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return mx.addmm(y, inner, self.lora_b.astype(x.dtype), alpha=self.scale).astype(y.dtype)

    def fuse(self, weight: mx.array) -> mx.array:
        """The weight (outputs, inputs), float32, of one linear that does what this module does.

        Args:
            weight: of the linear inside, (outputs, inputs).
        """
        return weight + self.scale * (self.lora_a @ self.lora_b).T

    def low_rank(self) -> LowRank:
        """The update alone."""
        return LowRank(self.lora_a, self.lora_b, self.scale)


def check_rank(rank: int, inputs: int, outputs: int) -> None:
    """Refuse a rank that no update of this shape can have.

    Raises:
        UsageError: it is below 1, or above the smaller side.
    """
    if not 1 <= rank <= min(inputs, outputs):
        raise UsageError(
            f"rank {rank} does not fit a linear of {outputs} outputs and {inputs} inputs, "
            f"wanted 1 to {min(inputs, outputs)}",
            fix="set another rank, or leave this linear out of the targets",
        )
