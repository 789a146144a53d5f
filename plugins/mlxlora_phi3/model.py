"""The transformer of Phi-3 (arXiv:2404.14219): a Llama whose positions turn otherwise in long texts.

Parameters have the names of Llama's original checkpoints. Shapes: B batch,
T tokens, S tokens attended to, D width, H heads, K kv heads, E head width,
F mlp width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.api import Cache
from mlxlora_core.ops import (
    GatedFeedForward,
    KVCache,
    LanguageModel,
    Mask,
    Positions,
    RMSNorm,
    Rows,
    attend,
    attention_mask,
    positions,
    rotate,
)
from mlxlora_phi3.config import ModelArgs
from mlxlora_phi3.rope import Turning, turnings

# Tokens that are read again at a time, which bounds what that needs of memory.
_PART = 256


class Attention(nn.Module):
    """Causal attention with rotary positions in the first features of each head.

    Attributes:
        window: tokens that a token sees, itself included, or None for all before it.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.head_dim, self.turned = args.head_dim, args.turned
        self.window, self._factor = args.sliding_window, args.rope_attention_factor or 1.0
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def __call__(self, x: mx.array, mask: Mask, turning: Turning, cache: Cache | None = None) -> mx.array:
        """Attend from (B, T, D) to itself and to what ``cache`` holds.

        Args:
            x: the normalised hidden states.
            mask: as :func:`mlxlora_core.ops.attention_mask` makes it.
            turning: how positions turn, in ``cache`` too.
            cache: keys and values of the tokens before these; these are appended.
        """
        offset = positions(mask, cache)
        queries = self._turn(self._heads(self.wq(x), self.n_heads), offset, turning)  # (B, H, T, E)
        keys = self._turn(self._heads(self.wk(x), self.n_kv_heads), offset, turning)  # (B, K, T, E)
        values = self._heads(self.wv(x), self.n_kv_heads)
        out = attend(queries, keys, values, self.head_dim**-0.5, mask, cache, self.window)
        return self.wo(out.swapaxes(1, 2).flatten(2))

    def _turn(self, x: mx.array, offset: int | Rows | Positions, turning: Turning) -> mx.array:
        """(B, ·, T, E) with the features that are turned at their positions, the rest as they are."""
        if self.turned == self.head_dim:
            return rotate(x, offset, turning, self._factor)
        turned = rotate(x[..., : self.turned], offset, turning, self._factor)
        return mx.concatenate([turned, x[..., self.turned :]], axis=-1)

    def _heads(self, x: mx.array, heads: int) -> mx.array:
        """(B, T, heads · E) -> (B, heads, T, E)."""
        return mx.unflatten(x, 2, (heads, self.head_dim)).swapaxes(1, 2)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each of the normalised input and added to it."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.attention = Attention(args)
        self.feed_forward = GatedFeedForward(args.dim, args.hidden_dim)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def __call__(self, x: mx.array, mask: Mask, turning: Turning, cache: Cache | None = None) -> mx.array:
        """(B, T, D) -> (B, T, D); see :class:`Attention` for the arguments."""
        x = x + self.attention(self.attention_norm(x), mask, turning, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class TextCache:
    """Keys and values of one layer, and how their positions turn.

    Attributes:
        long: whether they turn as in a long text.
        entered: while they do not, what entered the lowest layer that is run, (B, ·, D) each.
    """

    def __init__(self) -> None:
        self._held = KVCache()
        self.long = False
        self.entered: list[mx.array] = []

    @property
    def offset(self) -> int:
        """Tokens held."""
        return self._held.offset

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, E); return all that are held."""
        return self._held.update(keys, values)

    def begin_again(self) -> None:
        """Hold nothing, of a long text."""
        self._held, self.long, self.entered = KVCache(), True, []


class Model(LanguageModel):
    """A model of the Phi-3 family.

    All positions of a text turn in one of two ways, by its length. With a cache a
    text is read again, from its first token, when it becomes longer than the
    original length: then the keys of all its tokens turn in the other way, and
    what stands in the layers above follows.

    Attributes:
        layers: the blocks, bottom first.
        head_path: ``output``, or nothing when the head is the embedding.
        vocab_size: V.
        context_tokens: longest sequence it was made for, or None.
        heads: H.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self.vocab_size, self.context_tokens = args.vocab_size, args.max_seq_len
        self.heads = args.n_heads
        self.head_path = "" if args.tie_word_embeddings else "output"
        self._turnings, self._window = turnings(args), args.sliding_window
        self.ragged = self._turnings.original is None
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
        """Hidden states (B, T, D) after layers ``first`` up to, not including, ``last``.

        A cache is one that :meth:`make_cache` has made, and a model that is cut into
        parts is cut at the same layers for all the text that it holds.
        """
        blocks = self.layers[first:last]
        if lengths is not None:
            return self._each(blocks, hidden, lengths)
        if cache is None or not blocks:
            return self._through(blocks, hidden, [None] * len(blocks))
        entries = list(cache[first:last])
        if self.ragged:
            return self._through(blocks, hidden, entries, long=False)
        kept = cast(list[TextCache], list(cache[first:]))
        if not self._turnings.is_long(entries[0].offset + hidden.shape[1]):
            kept[0].entered.append(hidden)
        elif not kept[0].long:
            self._read_again(blocks, kept)
        return self._through(blocks, hidden, entries)

    def _each(self, blocks: Sequence[nn.Module], hidden: mx.array, lengths: Sequence[int]) -> mx.array:
        """Hidden states after some layers of rows in (1, T, D), each of which turns by its own length."""
        parts, start = [], 0
        for long, group in groupby(lengths, self._turnings.is_long):
            rows = list(group)
            stop = start + sum(rows)
            entries = [None] * len(blocks)
            parts.append(self._through(blocks, hidden[:, start:stop], entries, long, rows))
            start = stop
        return mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def _through(
        self,
        blocks: Sequence[nn.Module],
        hidden: mx.array,
        entries: Sequence[Cache | None],
        long: bool | None = None,
        lengths: Sequence[int] | None = None,
    ) -> mx.array:
        """Hidden states after some layers; ``long`` where it is known how their texts turn."""
        held = entries[0].offset if entries and entries[0] is not None else 0
        long = self._turnings.is_long(held + hidden.shape[1]) if long is None else long
        turning = self._turnings.long if long else self._turnings.short
        mask = attention_mask(hidden.shape[1], held, self._window, lengths)
        for block, entry in zip(blocks, entries, strict=True):
            hidden = block(hidden, mask, turning, entry)
        return hidden

    def _read_again(self, blocks: Sequence[nn.Module], kept: Sequence[TextCache]) -> None:
        """Fill the caches of some layers anew, of the same tokens in a text that has become long.

        Args:
            blocks: the layers.
            kept: of these and of all above them.
        """
        parts = kept[0].entered
        for entry in kept[: len(blocks)]:
            entry.begin_again()
        if not parts:
            return
        before = mx.concatenate(parts, axis=1)  # (B, held, D)
        left = []
        for start in range(0, before.shape[1], _PART):
            left.append(
                self._through(blocks, before[:, start : start + _PART], kept[: len(blocks)], long=True)
            )
            mx.eval(left[-1])
        above = kept[len(blocks) :]
        if above and above[0].entered:  # the layers above are run by themselves, and read these again
            above[0].entered = left

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), final norm included."""
        hidden = self.norm(hidden)
        return self.output(hidden) if self.head_path else self.tok_embeddings.as_linear(hidden)

    def make_cache(self) -> list[Cache]:
        """An empty cache, one entry a layer."""
        kind = KVCache if self._turnings.original is None else TextCache
        return [kind() for _ in self.layers]
