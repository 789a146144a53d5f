"""The transformer of Gemma 2 (arXiv:2408.00118) and of the text models of Gemma 3 (arXiv:2503.19786).

Parameters are named after those of Llama's original checkpoints, and features
that rotary positions turn are neighbours. Shapes: B batch, T tokens, S tokens
attended to, D width, H heads, K kv heads, E head width, F mlp width, V vocabulary.
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
    attend,
    attention_mask,
    gelu_times,
    positions,
    rms_norm,
    rotate,
)
from mlxlora_gemma.config import ModelArgs


class RMSNorm(nn.Module):
    """Normalisation by the root of the mean square, times one more than a weight a feature."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.weight = mx.zeros((dim,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise (..., D) over its last axis; the product is in float32."""
        return rms_norm(x, 1.0 + self.weight.astype(mx.float32), self.eps).astype(x.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions, where H / K query heads share a key and value head.

    Attributes:
        window: tokens that a token sees, itself included, or None for all before it.
    """

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.head_dim = args.head_dim
        self.window = args.window(layer)
        self.head_norms = bool(args.head_norms)
        self._turning = args.turning(layer)
        self._scale, self._cap = args.query_pre_attn_scalar**-0.5, args.attn_logit_softcapping
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        if self.head_norms:
            self.q_norm = RMSNorm(args.head_dim, args.norm_eps)
            self.k_norm = RMSNorm(args.head_dim, args.norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None = None) -> mx.array:
        """Attend within (B, T, D), and to what the cache holds from before.

        Args:
            x: (B, T, D).
            mask: as :func:`mlxlora_core.ops.attention_mask` makes it.
            cache: of this layer.
        """
        queries = self._heads(self.wq(x), self.n_heads)  # (B, H, T, E)
        keys = self._heads(self.wk(x), self.n_kv_heads)  # (B, K, T, E)
        values = self._heads(self.wv(x), self.n_kv_heads)
        if self.head_norms:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        offset = positions(mask, cache)
        queries, keys = rotate(queries, offset, self._turning), rotate(keys, offset, self._turning)
        out = attend(queries, keys, values, self._scale, mask, cache, self.window, self._cap)
        return self.wo(out.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array, heads: int) -> mx.array:
        """(B, T, heads · E) -> (B, heads, T, E)."""
        return mx.unflatten(x, 2, (heads, self.head_dim)).swapaxes(1, 2)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each of the normalised input, normalised again and added to it."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.attention = Attention(args, layer)
        self.feed_forward = GatedFeedForward(args.dim, args.hidden_dim, gelu_times)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.post_attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.post_ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None = None) -> mx.array:
        """(B, T, D) -> (B, T, D); see :class:`Attention` for the arguments."""
        x = x + self.post_attention_norm(self.attention(self.attention_norm(x), mask, cache))
        return x + self.post_ffn_norm(self.feed_forward(self.ffn_norm(x)))


class Model(LanguageModel):
    """A Gemma.

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
        self._factor, self._cap = args.dim**0.5, args.final_logit_softcapping
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = [TransformerBlock(args, layer) for layer in range(args.n_layers)]
        self.norm = RMSNorm(args.dim, args.norm_eps)
        if not args.tie_word_embeddings:
            self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings (B, T, D) of token ids (B, T), times the root of D as their type has it.

        They are in float32 where the weight is in float16, whose range the hidden states of Gemma leave.
        """
        embeddings: mx.array = self.tok_embeddings(tokens)
        if embeddings.dtype == mx.float16:
            embeddings = embeddings.astype(mx.float32)
        return embeddings * mx.array(self._factor, embeddings.dtype)

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
        windows = {block.attention.window for block in blocks}
        masks = {window: attention_mask(hidden.shape[1], held, window, lengths) for window in windows}
        for block, entry in zip(blocks, entries, strict=True):
            hidden = block(hidden, masks[block.attention.window], entry)
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), final norm included."""
        hidden = self.norm(hidden)
        logits = self.output(hidden) if self.head_path else self.tok_embeddings.as_linear(hidden)
        return logits if self._cap is None else mx.tanh(logits / self._cap) * self._cap

    def make_cache(self) -> list[Cache]:
        """An empty cache, one entry a layer."""
        return [KVCache() for _ in self.layers]
