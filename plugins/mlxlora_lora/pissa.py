"""A linear layer whose largest singular values train."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxlora_core.api import LowRank
from mlxlora_core.ops import dense_weight, linear_shape
from mlxlora_lora.linear import check_rank

Matrix = npt.NDArray[Any]


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
        self._iterations = iterations
        self.lora_a, self.lora_b = mx.zeros((inputs, rank)), mx.zeros((rank, outputs))
        self.lora_a0, self.lora_b0 = mx.zeros((inputs, rank)), mx.zeros((rank, outputs))
        self.freeze(recurse=False, keys=["lora_a0", "lora_b0"])

    def initialise(self) -> None:
        """Take the weight apart."""
        weight, rank = np.array(dense_weight(self.linear).astype(mx.float32)), self.lora_a.shape[1]
        parts = _largest(weight, rank, self._iterations) if self._iterations else _whole(weight, rank)
        u, s, vt = (mx.array(part.astype(np.float32)) for part in parts)
        root = mx.sqrt(s / self.scale)
        self.lora_a, self.lora_b = vt.T * root, root[:, None] * u.T
        self.lora_a0, self.lora_b0 = mx.array(self.lora_a), mx.array(self.lora_b)

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type that the linear gives."""
        y: mx.array = self.linear(x)
        # A B - A0 B0 = (A - A0) B + A0 (B - B0): zero to the bit at the start, and differences are
        # taken where they are exact, not of products that are large in the type of x.
        left = mx.concatenate([self.lora_a - self.lora_a0, self.lora_a0], axis=1)  # (inputs, 2 R)
        right = mx.concatenate([self.lora_b, self.lora_b - self.lora_b0], axis=0)  # (2 R, outputs)
        inner = x @ left.astype(x.dtype)
        return mx.addmm(y, inner, right.astype(x.dtype), alpha=self.scale).astype(y.dtype)

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


def _whole(weight: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """The first ``rank`` columns of U, singular values, and rows of Vᵀ of a weight.

    They are the eigenvectors of W Wᵀ or Wᵀ W, whichever is smaller, in float64: as exact as singular
    values in float32, and three times as fast.
    """
    if weight.shape[0] > weight.shape[1]:
        v, s, ut = _whole(weight.T, rank)
        return ut.T, s, v.T
    wide = weight.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)
    u = vectors[:, ::-1][:, :rank]
    s = np.sqrt(np.maximum(values[::-1][:rank], 0))
    return u, s, np.divide(u.T @ wide, s[:, None], where=s[:, None] > 0, out=np.zeros((rank, wide.shape[1])))


def _largest(weight: Matrix, rank: int, iterations: int) -> tuple[Matrix, Matrix, Matrix]:
    """About the same as :func:`_whole`, by subspace iteration.

    Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1, with as many
    further columns as there are ranks.
    """
    columns = min(2 * rank, *weight.shape)
    basis, _ = np.linalg.qr(weight @ np.array(mx.random.normal((weight.shape[1], columns))))
    for _ in range(iterations):
        back, _ = np.linalg.qr(weight.T @ basis)
        basis, _ = np.linalg.qr(weight @ back)
    u, s, vt = _whole(basis.T @ weight, rank)
    return basis @ u, s, vt
