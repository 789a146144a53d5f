"""An embedding with a low-rank update beside it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.api import LowRank
from mlxlora_lora.linear import check_rank


class LoRAEmbedding(nn.Module):
    """``e = embedding(t) + scale · lora_a[t] @ lora_b``, where the embedding is frozen.

    ``lora_a`` (V, R) starts at zero and ``lora_b`` (R, D) normal, as the authors' own code has it,
    so that tokens which no row holds keep their embedding. Both are float32. Where the embedding is
    the output head too, that has the same update.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3, with one-hot inputs.

    Args:
        embedding: dense or quantized; it is frozen.
        shape: (V, D) of it.
        rank: R.
        scale: factor on the update.

    Raises:
        UsageError: a rank below 1, or above what the shape can have.
    """

    def __init__(self, embedding: nn.Module, shape: tuple[int, ...], rank: int, scale: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        words, dim = shape
        check_rank(rank, dim, words)
        self.linear = embedding
        self.linear.freeze()
        self.scale = scale
        self.lora_a = mx.zeros((words, rank))
        self.lora_b = mx.random.normal((rank, dim))

    def __call__(self, tokens: mx.array) -> mx.array:
        """Embeddings (..., D) of token ids (...), in the type that the embedding gives."""
        y: mx.array = self.linear(tokens)
        a, b = self.lora_a[tokens].astype(y.dtype), self.lora_b.astype(y.dtype)
        return mx.addmm(y, a, b, alpha=self.scale)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), where the embedding is the output head too."""
        y: mx.array = self.linear.as_linear(x)
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        return mx.addmm(y, x @ b.T, a.T, alpha=self.scale).astype(y.dtype)

    def fuse(self, weight: mx.array) -> mx.array:
        """The weight (V, D), float32, of one embedding that does what this module does.

        Args:
            weight: of the embedding inside, (V, D).
        """
        return weight + self.scale * (self.lora_a @ self.lora_b)

    def low_rank(self) -> LowRank:
        """The update alone."""
        return LowRank(self.lora_a, self.lora_b, self.scale)
