"""The transformer of Llama (arXiv:2302.13971), Mistral (arXiv:2310.06825), Qwen and SmolLM.

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
from mlxlora_llama import rope
from mlxlora_llama.config import ModelArgs


class Attention(nn.Module):
    """Causal attention with rotary positions, where H / K query heads share a key and value head.

    Source: Ainslie et al. 2023, arXiv:2305.13245.

    Attributes:
        window: tokens that a token sees, itself included, or None for all before it.
        rotated: whether queries and keys are turned by their positions.
    """

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.head_dim = args.head_dim
        self.window = args.window(layer)
        self.rotated = layer not in (args.unrotated_layers or ())
        self._turning, self._factor = rope.turning(args), args.rope_attention_factor or 1.0
        self.wq = linear(args, "wq", args.dim, args.n_heads * args.head_dim)
        self.wk = linear(args, "wk", args.dim, args.n_kv_heads * args.head_dim)
        self.wv = linear(args, "wv", args.dim, args.n_kv_heads * args.head_dim)
        self.wo = linear(args, "wo", args.n_heads * args.head_dim, args.dim)
        self.head_norms = bool(args.head_norms)
        if self.head_norms:
            self.q_norm = RMSNorm(args.head_dim, args.norm_eps)
            self.k_norm = RMSNorm(args.head_dim, args.norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None = None) -> mx.array:
        """Attend from (B, T, D) to itself and to what ``cache`` holds.

        Args:
            x: the normalised hidden states.
            mask: as :func:`attention_mask` makes it.
            cache: keys and values of the tokens before these; these are appended.
        """
        queries = self._heads(self.wq(x), self.n_heads)  # (B, H, T, E)
        keys = self._heads(self.wk(x), self.n_kv_heads)  # (B, K, T, E)
        values = self._heads(self.wv(x), self.n_kv_heads)
        if self.head_norms:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if self.rotated:
            offset = positions(mask, cache)
            queries = rotate(queries, offset, self._turning, self._factor)
            keys = rotate(keys, offset, self._turning, self._factor)
        out = attend(queries, keys, values, self.head_dim**-0.5, mask, cache, self.window)
        return self.wo(out.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array, heads: int) -> mx.array:
        """(B, T, heads · E) -> (B, heads, T, E)."""
        return mx.unflatten(x, 2, (heads, self.head_dim)).swapaxes(1, 2)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each of the normalised input and added to it."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.attention = Attention(args, layer)
        self.feed_forward = GatedFeedForward(args.dim, args.hidden_dim, biases=args.biases or ())
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None = None) -> mx.array:
        """(B, T, D) -> (B, T, D); see :class:`Attention` for the arguments."""
        x = x + self.attention(self.attention_norm(x), mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Model(LanguageModel):
    """A model of the Llama family.

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
        self.layers = [TransformerBlock(args, layer) for layer in range(args.n_layers)]
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
        windows = {block.attention.window for block in blocks}
        masks = {window: attention_mask(hidden.shape[1], held, window, lengths) for window in windows}
        for block, entry in zip(blocks, entries, strict=True):
            hidden = block(hidden, masks[block.attention.window], entry)
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), final norm included."""
        hidden = self.norm(hidden)
        return self.output(hidden) if self.head_path else self.tok_embeddings.as_linear(hidden)

    def make_cache(self) -> list[Cache]:
        """An empty cache, one entry a layer."""
        return [KVCache() for _ in self.layers]


def linear(args: ModelArgs, name: str, inputs: int, outputs: int) -> nn.Linear:
    """One of the linears of a layer, with a bias where the model has one there."""
    return nn.Linear(inputs, outputs, bias=name in (args.biases or ()))
