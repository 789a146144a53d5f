"""A linear layer with frozen random projections beside it, and two vectors that train."""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.api import LowRank
from mlxlora_core.ops import Dropout, linear_shape

_BLOCK = 256  # rows that are drawn with one key, so that a longer projection begins as a shorter one


class VeRALinear(nn.Module):
    """``y = linear(x) + lambda_b · ((dropout(x) @ vera_a · lambda_d) @ vera_b)``, with a frozen linear.

    ``vera_a`` (inputs, R) and ``vera_b`` (R, outputs) are random and do not train: linears of one
    shape share them, and those of another have the same numbers, as many as they need, each with
    the factor of its own width. ``lambda_d`` (R,) starts at ``d_initial`` and ``lambda_b`` (outputs,)
    at zero, so that the start is the linear itself.
    Source: Kopiczko et al. 2023, arXiv:2310.11454, eq. 2 and section 3.2, with uniform numbers (He
    et al. 2015, arXiv:1502.01852, eq. 10).

    Args:
        linear: dense or quantized, with or without a bias; it is frozen.
        rank: R; it may be above the sides of the linear.
        d_initial: where ``lambda_d`` starts.
        dropout: share of ``x`` dropped on the way into the update while training.
        seed: of the projections.
    """

    def __init__(self, linear: nn.Module, rank: int, d_initial: float, dropout: float, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        outputs, inputs = linear_shape(linear)
        self.linear = linear
        self.linear.freeze()
        self.dropout = Dropout(dropout)
        self.vera_a, self.vera_b = _first(seed, inputs, rank), _second(seed, outputs, rank)
        self.lambda_d = mx.full((rank,), d_initial)
        self.lambda_b = mx.zeros((outputs,))
        self.freeze(recurse=False, keys=["vera_a", "vera_b"])

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type that the linear gives."""
        y: mx.array = self.linear(x)
        inner = (self.dropout(x) @ self.vera_a.astype(x.dtype)) * self.lambda_d
        update = inner.astype(x.dtype) @ self.vera_b.astype(x.dtype)
        return (y + update * self.lambda_b).astype(y.dtype)

    def fuse(self, weight: mx.array) -> mx.array:
        """The weight (outputs, inputs), float32, of one linear that does what this module does.

        Args:
            weight: of the linear inside, (outputs, inputs).
        """
        update = self.low_rank()
        return weight + (update.a @ update.b).T

    def low_rank(self) -> LowRank:
        """The vectors multiplied into the projections."""
        return LowRank(self.vera_a * self.lambda_d, self.vera_b * self.lambda_b, 1.0)


# The same array for every linear of a shape: an adapter file then holds it once, and so does memory.


@lru_cache(maxsize=32)
def _first(seed: int, inputs: int, rank: int) -> mx.array:
    """The projection (inputs, R)."""
    projection = _uniform(2 * seed, inputs, rank) * math.sqrt(6 / inputs)
    mx.eval(projection)
    return projection


@lru_cache(maxsize=32)
def _second(seed: int, outputs: int, rank: int) -> mx.array:
    """The projection (R, outputs)."""
    projection = (_uniform(2 * seed + 1, outputs, rank) * math.sqrt(6 / rank)).T
    mx.eval(projection)
    return projection


def _uniform(seed: int, count: int, rank: int) -> mx.array:
    """Uniform numbers (count, R) in ±1, whose first rows do not depend on how many there are."""
    key, blocks = mx.random.key(seed), []
    for _ in range(-(-count // _BLOCK)):
        key, drawn = mx.random.split(key)
        blocks.append(mx.random.uniform(-1, 1, (_BLOCK, rank), key=drawn))
    return mx.concatenate(blocks)[:count]
