"""Estimates the memory that a model needs beside its weights, from the shapes of its linears.

The factors were fitted to MLX's own count of its memory over models of many shapes
(``tests/core/training/test_training_memory.py`` compares them). Counts are of numbers in the type
that is computed in: R rows, T tokens a row, S tokens that the last of them sees, V words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import ResourceError
from mlxlora_core.machine.device import LARGEST_CACHE_BYTES, on_cpu
from mlxlora_core.machine.memory import free_memory_bytes, require_memory
from mlxlora_core.machine.processors import thread_count
from mlxlora_core.model.head_loss import chunk_rows
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import (
    is_expanded,
    is_packed,
    layers_by_path,
    linear_shape,
    linears,
    packed_shape,
    weight_shape,
)

#: words of logits that the cross-entropy holds at once for each counted token, without its gradient
_LOGITS = 4
#: the same of a chunk of them, with or without it: of the next chunk some stand in memory already
_CHUNK_LOGITS = 6.5
#: scores of a layer, and what goes into and comes out of its linears, that stand in memory at once
_SCORES, _WIDTH = 2.7, 1.5
#: of a weight that is expanded for each product, how many stand in memory at once on a thread
_EXPANDED = 3
_TILE = 64  # queries that attention takes at a time, or an eighth of all
_HEAD_WIDTH = 64  # where a model does not tell how many heads it has: few are narrower
CACHE_STEP = 256  # tokens by which a cache grows

SHORTER = "shorten the prompt, or use a smaller model, or fewer bits of it (--quantize)"
#: tokens of a prompt that are read at a time, and of how many where memory is short
PARTS = (512, 256, 128, 64, 32, 16)

#: MLX may keep such a share of what work takes for reuse, and at least so many bytes
_REUSED_SHARE, _REUSED_BYTES = 0.25, 64 << 20


@dataclass(frozen=True)
class Sizes:
    """What the estimates are made of.

    Attributes:
        widths: for each layer, the sum of inputs and outputs of its linears.
        kv_widths: for each layer, of its keys and its values together.
        heads: of attention.
        dim: width of the hidden states.
        vocab_size: V.
        number_bytes: of a number in the type that is computed in.
        expanded_bytes: of the largest weights that are expanded for a product, on all threads.
        head_bytes: of the head once expanded, or 0 where it need not be.
    """

    widths: list[int]
    kv_widths: list[int]
    heads: int
    dim: int
    vocab_size: int
    number_bytes: int
    expanded_bytes: int
    head_bytes: int

    def scores(self, rows: int, tokens: int, seen: int) -> int:
        """Scores of attention in a layer: a tile of queries has those of all keys that its last one sees."""
        tiles = -(-tokens // max(_TILE, -(-tokens // 8)))
        return rows * self.heads * (tokens * (seen - tokens) + tokens**2 * (tiles + 1) // (2 * tiles))

    def layer_bytes(self, rows: int, tokens: int, seen: int) -> int:
        """Of the layer that takes most, as a batch passes through it."""
        numbers = _WIDTH * rows * tokens * max(self.widths, default=self.dim)
        numbers += _SCORES * self.scores(rows, tokens, seen)
        return int(numbers * self.number_bytes) + self.expanded_bytes

    def logits_bytes(self, tokens: int, rows: int = 1, words: int = _LOGITS) -> int:
        """Of logits, float32, and what the cross-entropy makes of them.

        Args:
            tokens: that go through the head.
            rows: that they are of, which are dealt to the cores.
            words: of logits that stand in memory at once where they are in one piece.
        """
        parts = min(rows, thread_count()) if on_cpu() else 1
        each = -(-tokens // parts)
        chunk = chunk_rows(each, self.vocab_size)
        if chunk < each:
            return parts * (int(4 * _CHUNK_LOGITS * chunk * self.vocab_size) + self.head_bytes)
        return 4 * words * tokens * self.vocab_size

    def cache_bytes(self, tokens: int) -> int:
        """Of the keys and values of so many tokens, in whole steps, with one layer's copied as it grows."""
        held = -(-tokens // CACHE_STEP) * CACHE_STEP
        width = sum(self.kv_widths) + max(self.kv_widths, default=0)
        return held * width * self.number_bytes


def sizes_of(model: LanguageModel) -> Sizes:
    """The sizes of a model, with or without an adapter on it."""
    module: nn.Module = model
    layer_of = layers_by_path(model)
    shapes: dict[int, list[tuple[int, ...]]] = {number: [] for number in range(len(model.layers))}
    dim, expanded = 1, 0
    for path, linear in linears(module):
        shape = linear_shape(linear)
        layer = layer_of(path)
        if layer is not None:
            shapes[layer].append(shape[-2:])
            dim = max(dim, min(shape[-2:]))
        if is_expanded(linear):
            expanded = max(expanded, 4 * math.prod(shape))
    return Sizes(
        widths=[sum(map(sum, found)) for found in shapes.values()],
        kv_widths=[2 * min((outputs for outputs, _ in found), default=0) for found in shapes.values()],
        heads=model.heads or max(1, dim // _HEAD_WIDTH),
        dim=dim,
        vocab_size=model.vocab_size,
        number_bytes=4 if on_cpu() else 2,
        expanded_bytes=_EXPANDED * expanded * (thread_count() if on_cpu() else 1),
        head_bytes=max(_expanded_heads(module, model.vocab_size), default=0),
    )


def _expanded_heads(module: nn.Module, vocab_size: int) -> Iterator[int]:
    """Bytes of each weight that may be a head's, and is expanded for a product."""
    for _, child in module.named_modules():
        if is_expanded(child):
            shape = packed_shape(child) if is_packed(child) else weight_shape(child)
            if shape[0] == vocab_size:
                yield 4 * math.prod(shape)


def measuring_bytes(sizes: Sizes, rows: int, tokens: int) -> int:
    """What the loss of ``rows`` of so many tokens takes, without a gradient."""
    hidden = 2 * rows * tokens * sizes.dim * sizes.number_bytes
    return hidden + max(sizes.layer_bytes(rows, tokens, tokens), sizes.logits_bytes(rows * tokens, rows))


def prompt_bytes(sizes: Sizes, tokens: int, part: int, more: int = 1) -> int:
    """What a prompt of so many tokens and ``more`` after it take, read in parts of ``part`` tokens."""
    part = min(part, tokens)
    logits = sizes.logits_bytes(1)
    return sizes.cache_bytes(tokens + more) + max(sizes.layer_bytes(1, part, tokens), logits)


def room_for_prompt(model: LanguageModel, tokens: int, more: int) -> tuple[int, str]:
    """In parts of how many tokens a prompt is read, and what that needs of memory, in words.

    Args:
        model: that reads it.
        tokens: of the prompt.
        more: tokens that may follow; memory for as many as a cache grows by at once is counted.

    Raises:
        ResourceError: it does not fit in the smallest parts either.
    """
    sizes, more = sizes_of(model), min(more, CACHE_STEP)
    part = next((part for part in PARTS if fits(prompt_bytes(sizes, tokens, part, more))), PARTS[-1])
    need = prompt_bytes(sizes, tokens, part, more)
    return part, require_for(need, f"a prompt of {tokens} tokens", SHORTER)


def require_growth(model: LanguageModel) -> None:
    """Refuse to go on with a text where the next step of the cache has no room.

    Raises:
        ResourceError: there is none.
    """
    need = 2 * sizes_of(model).cache_bytes(CACHE_STEP)
    if not fits(need):
        require_memory(need, f"another {CACHE_STEP} tokens of the text", "ask for fewer tokens")


def reused_bytes(need: int) -> int:
    """How much memory MLX may keep for reuse in work that needs ``need`` bytes."""
    return max(_REUSED_BYTES, int(_REUSED_SHARE * need))


def require_for(need: int, work: str, fix: str) -> str:
    """What ``work`` needs, in words, after MLX was told how much freed memory it may keep for it.

    A CPU computes faster in memory that it has held before; but MLX keeps pieces
    of each size that it has met, until they are as much as it may keep.

    Args:
        need: bytes that the work holds at once.
        work: what needs them.
        fix: what the user can do about it.

    Raises:
        ResourceError: less is free.
    """
    mx.clear_cache()
    kept = reused_bytes(need)
    free = free_memory_bytes()
    if on_cpu():
        kept = kept if free is None else max(0, min(kept, (free - need) // 2))
        mx.set_cache_limit(min(kept, LARGEST_CACHE_BYTES))
    return require_memory(need + kept // 2, work, fix)


def has_room(need: int) -> bool:
    """Whether :func:`require_for` finds memory for work that holds ``need`` bytes at once."""
    mx.clear_cache()
    try:
        require_memory(need if on_cpu() else need + reused_bytes(need) // 2, "", "")
    except ResourceError:
        return False
    return True


def fits(need: int) -> bool:
    """Whether work that holds ``need`` bytes at once finds them, if need be after MLX gave away its own."""
    free = free_memory_bytes()
    if free is not None and need > free:
        mx.clear_cache()
        free = free_memory_bytes()
    return free is None or need <= free
