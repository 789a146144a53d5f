"""A linear layer whose largest singular values train."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.api import LowRank
from mlxlora_core.ops import dense_weight, linear_shape
from mlxlora_lora.linear import check_rank


class PiSSALinear(nn.Module):
    """``y = linear(x) + scale · (x @ lora_a @ lora_b - x @ lora_a0 @ lora_b0)``, with a frozen linear.

    ``lora_a`` (inputs, R) and ``lora_b`` (R, outputs) start as the R largest singular values of the
    weight and their vectors, shared out evenly: W = U S Vᵀ, A = V √(S / scale), B = √(S / scale) Uᵀ.
    ``lora_a0`` and ``lora_b0`` stay what these were. The paper takes their product out of the
    weight instead; here the base stays what it is, and the gradients are the same.
    Source: Meng et al. 2024, arXiv:2404.02948, eq. 2 to 5.

    Args:
        linear: dense or quantized, with or without a bias; it is frozen.
        rank: R.
        scale: factor on the products, above 0.
        iterations: of the power method, on a random start, that finds the singular vectors; 0 takes
            the whole decomposition.

    Raises:
        UsageError: a rank below 1, or above what the shape of the linear can have.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, iterations: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        outputs, inputs = linear_shape(linear)
        check_rank(rank, inputs, outputs)
        self.linear = linear
        self.linear.freeze()
        self.scale = scale
        weight = dense_weight(linear).astype(mx.float32)
        u, s, vt = _largest(weight, rank, iterations) if iterations else _whole(weight, rank)
        root = mx.sqrt(s / scale)
        self.lora_a, self.lora_b = vt.T * root, root[:, None] * u.T
        self.lora_a0, self.lora_b0 = mx.array(self.lora_a), mx.array(self.lora_b)
        self.freeze(recurse=False, keys=["lora_a0", "lora_b0"])

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type that the linear gives."""
        y: mx.array = self.linear(x)
        # The difference first: at the start it is zero to the bit.
        update = (x @ self.lora_a) @ self.lora_b - (x @ self.lora_a0) @ self.lora_b0
        return (y + self.scale * update).astype(y.dtype)

    def fuse(self, weight: mx.array) -> mx.array:
        """The weight (outputs, inputs), float32, of one linear that does what this module does.

        Args:
            weight: of the linear inside, (outputs, inputs).
        """
        return weight + self.scale * (self.lora_a @ self.lora_b - self.lora_a0 @ self.lora_b0).T

    def low_rank(self) -> LowRank:
        """The same as an update of rank 2 R on the weight as it is."""
        a = mx.concatenate([self.lora_a, self.lora_a0], axis=1)
        b = mx.concatenate([self.lora_b, -self.lora_b0], axis=0)
        return LowRank(a, b, self.scale)


def _whole(weight: mx.array, rank: int) -> tuple[mx.array, mx.array, mx.array]:
    """The first ``rank`` columns of U, singular values, and rows of Vᵀ of a weight."""
    with mx.stream(mx.cpu):  # the only device that MLX takes weights apart on
        u, s, vt = mx.linalg.svd(weight)
        return u[:, :rank], s[:rank], vt[:rank]


def _largest(weight: mx.array, rank: int, iterations: int) -> tuple[mx.array, mx.array, mx.array]:
    """About the same as :func:`_whole`, by subspace iteration.

    Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1, with as many
    further columns as there are ranks.
    """
    columns = min(2 * rank, *weight.shape)
    with mx.stream(mx.cpu):
        basis, _ = mx.linalg.qr(weight @ mx.random.normal((weight.shape[1], columns)))
        for _ in range(iterations):
            back, _ = mx.linalg.qr(weight.T @ basis)
            basis, _ = mx.linalg.qr(weight @ back)
        u, s, vt = mx.linalg.svd(basis.T @ weight)
        return basis @ u[:, :rank], s[:rank], vt[:rank]
