"""Parts of a transformer block that many families share; parameters are named as in Llama."""

from __future__ import annotations

from collections.abc import Callable, Collection

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.model.ops import rms_norm, silu_times


class RMSNorm(nn.Module):
    """Normalisation by the root of the mean square, with a weight a feature.

    Args:
        dim: features, D.
        eps: what is added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.weight = mx.ones((dim,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise (..., D) over its last axis."""
        return rms_norm(x, self.weight, self.eps)


class GatedFeedForward(nn.Module):
    """``w2(gate(w1 x) · w3 x)``. Source: Shazeer 2020, arXiv:2002.05202, equation 6.

    Args:
        dim: width, D.
        hidden_dim: width inside, F.
        gated: what gives the product of the gate's activation and the other branch.
        biases: which of ``w1``, ``w2`` and ``w3`` have a bias.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        gated: Callable[[mx.array, mx.array], mx.array] = silu_times,
        biases: Collection[str] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self._gated = gated
        self.w1 = nn.Linear(dim, hidden_dim, bias="w1" in biases)
        self.w2 = nn.Linear(hidden_dim, dim, bias="w2" in biases)
        self.w3 = nn.Linear(dim, hidden_dim, bias="w3" in biases)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, D) -> (B, T, D), each token by itself."""
        return self.w2(self._gated(self.w1(x), self.w3(x)))
