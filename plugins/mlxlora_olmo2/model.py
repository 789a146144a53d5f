"""The transformer of OLMo 2 (arXiv:2501.00656): norms after attention and feed-forward, none before.

Parameters have the names of Llama's original checkpoints. Shapes: B batch,
T tokens, S tokens attended to, D width, H heads, K kv heads, E head width,
F mlp width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.api import Cache
from mlxlora_core.ops import (
    GatedFeedForward,
    KVCache,
    LanguageModel,
    Mask,
    RMSNorm,
    attend,
    attention_mask,
    positions,
    rotate,
)
from mlxlora_olmo2.config import ModelArgs


class Attention(nn.Module):
    """Causal attention with rotary positions, queries and keys normalised over all heads at once."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.head_dim, self._theta = args.head_dim, args.rope_theta
        queries, keys, bias = (
            args.n_heads * args.head_dim,
            args.n_kv_heads * args.head_dim,
            bool(args.attention_bias),
        )
        self.wq = nn.Linear(args.dim, queries, bias=bias)
        self.wk = nn.Linear(args.dim, keys, bias=bias)
        self.wv = nn.Linear(args.dim, keys, bias=bias)
        self.wo = nn.Linear(queries, args.dim, bias=bias)
        self.q_norm = RMSNorm(queries, args.norm_eps)
        self.k_norm = RMSNorm(keys, args.norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None = None) -> mx.array:
        """Attend from (B, T, D) to itself and to what ``cache`` holds.

        Args:
            x: the hidden states.
            mask: as :func:`mlxlora_core.ops.attention_mask` makes it.
            cache: keys and values of the tokens before these; these are appended.
        """
        offset = positions(mask, cache)
        queries = self._heads(self.q_norm(self.wq(x)), self.n_heads)  # (B, H, T, E)
        keys = self._heads(self.k_norm(self.wk(x)), self.n_kv_heads)  # (B, K, T, E)
        values = self._heads(self.wv(x), self.n_kv_heads)
        queries, keys = rotate(queries, offset, self._theta), rotate(keys, offset, self._theta)
        out = attend(queries, keys, values, self.head_dim**-0.5, mask, cache)
        return self.wo(out.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array, heads: int) -> mx.array:
        """(B, T, heads · E) -> (B, heads, T, E)."""
        return mx.unflatten(x, 2, (heads, self.head_dim)).swapaxes(1, 2)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised and added to its input."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.attention = Attention(args)
        self.feed_forward = GatedFeedForward(args.dim, args.hidden_dim)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None = None) -> mx.array:
        """(B, T, D) -> (B, T, D); see :class:`Attention` for the arguments."""
        x = x + self.attention_norm(self.attention(x, mask, cache))
        return x + self.ffn_norm(self.feed_forward(x))


class Model(LanguageModel):
    """A model of the OLMo 2 family.

    Attributes:
        layers: the blocks, bottom first.
        head_path: ``output``, or nothing when the head is the embedding.
        vocab_size: V.
        context_tokens: longest sequence it was made for, or None.
        heads: H.
    """

    ragged = True

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.vocab_size, self.context_tokens = args.vocab_size, args.max_seq_len
        self.heads = args.n_heads
        self.head_path = "" if args.tie_word_embeddings else "output"
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = [TransformerBlock(args) for _ in range(args.n_layers)]
        self.norm = RMSNorm(args.dim, args.norm_eps)
        if not args.tie_word_embeddings:
            self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings (B, T, D) of token ids (B, T)."""
        embeddings: mx.array = self.tok_embeddings(tokens)
        return embeddings

    def run(
        self,
        hidden: mx.array,
        first: int = 0,
        last: int | None = None,
        cache: Sequence[Cache] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> mx.array:
        """Hidden states (B, T, D) after layers ``first`` up to, not including, ``last``."""
        blocks = self.layers[first:last]
        entries = [None] * len(blocks) if cache is None else cache[first:last]
        held = entries[0].offset if entries and entries[0] is not None else 0
        mask = attention_mask(hidden.shape[1], held, None, lengths)
        for block, entry in zip(blocks, entries, strict=True):
            hidden = block(hidden, mask, entry)
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), final norm included."""
        hidden = self.norm(hidden)
        return self.output(hidden) if self.head_path else self.tok_embeddings.as_linear(hidden)

    def make_cache(self) -> list[Cache]:
        """An empty cache, one entry a layer."""
        return [KVCache() for _ in self.layers]
