"""Attention on a CPU, written out in tiles of queries that skip the keys none of them sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxlora_core.machine.device import lent
from mlxlora_core.model.ops.lent import exp, layers_for, row_sums
from mlxlora_core.model.ops.rows import Rows

# Causal attention takes so many queries at a time, or an eighth of them if that is more.
_TILE = 64

# The same if a runtime does all that is done to scores in one operation: larger tiles pay then.
_FUSED_TILE = 128

# The score of a key that a query does not see; finite, so that a query that sees none gets a mean, not NaN.
_UNSEEN = float(np.finfo(np.float32).min)


def attention_of_one(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Attention (B, H, 1, E) of one query per head, which sees all keys; for any type."""
    group, seen = queries.shape[1] // keys.shape[1], keys.shape[2]
    rows = _rows(queries * scale, group, _Tile(0, 1, seen, None))  # (B, K, H / K, E)
    weights = mx.softmax(rows @ keys.swapaxes(-1, -2), axis=-1, precise=True)  # (B, K, H / K, S)
    return (weights @ values).reshape(queries.shape)  # (B, H, 1, E)


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """See :func:`mlxlora_core.model.ops.attention`; the mask is one that fits."""
    heads, length = queries.shape[1:3]
    kv_heads, seen = keys.shape[1:3]
    if isinstance(mask, mx.array):
        added = mx.where(mask, 0.0, _UNSEEN) if mask.dtype == mx.bool_ else mask.astype(mx.float32)
        bias = _grouped(added, heads, kv_heads, length)  # (·, ·, H / K · T, S)
        whole = [_Tile(0, length, seen, None)]
        return cast(mx.array, _attention(whole, scale)(queries, keys, values, bias)[0])
    if mask is None:
        tiles = [_Tile(0, length, seen, None)]
    else:
        # No work on the keys that none of a tile's queries sees: nearly half of all.
        size = _TILE if lent("exp_rows") is None else _FUSED_TILE
        tiles = _causal_tiles(length, seen, max(size, -(-length // 8)))
    return cast(mx.array, _attention(tiles, scale)(queries, keys, values)[0])


def attention_of_rows(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, rows: Rows
) -> mx.array:
    """Attention (1, H, T, E) within each of the packed rows."""
    return cast(mx.array, _attention(_tiles_of_rows(rows), scale)(queries, keys, values)[0])


@dataclass(frozen=True)
class _Tile:
    """Queries ``start`` to ``stop``, and the keys that they see: ``first`` up to, not including, ``keys``.

    ``bias`` (stop - start, keys - first), if given, is added to their scores. ``causal`` says that the
    bias is the plain triangle: the last query sees all keys, the one before all but one, and so on.
    """

    start: int
    stop: int
    keys: int
    bias: mx.array | None
    first: int = 0
    causal: bool = False

    def seen(self, x: mx.array) -> mx.array:
        """The part of (B, K, S, E) that its queries see."""
        return x[:, :, self.first : self.keys]


def _causal_tiles(length: int, seen: int, size: int) -> list[_Tile]:
    """Tiles of at most ``size`` queries; the last query is at the last key."""
    tiles = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        keys = seen - length + stop
        query = mx.arange(keys - (stop - start), keys)[:, None]  # (t, 1)
        bias = mx.where(query >= mx.arange(keys), 0.0, -mx.inf)  # (t, keys)
        tiles.append(_Tile(start, stop, keys, bias, causal=True))
    return tiles


@lru_cache(maxsize=8)
def _tiles_of_rows(rows: Rows) -> list[_Tile]:
    """Tiles of queries from one row, or of several whole short rows, with the keys that any of them sees."""
    tiles = []
    row = np.repeat(np.arange(len(rows.lengths)), rows.lengths)  # (T,)
    for begin, end in _together(rows.lengths, _TILE):
        size = max(_TILE, -(-(end - begin) // 8))
        for start in range(begin, end, size):
            stop = min(start + size, end)
            first = begin if rows.window is None else max(begin, start - rows.window + 1)
            query, key = np.arange(start, stop)[:, None], np.arange(first, stop)
            seen = (row[query] == row[key]) & (key <= query)  # (t, keys)
            if rows.window is not None:
                seen &= key > query - rows.window
            bias = mx.array(np.where(seen, np.float32(0), np.float32(-np.inf)))
            tiles.append(_Tile(start, stop, stop, bias, first))
    return tiles


def _together(lengths: tuple[int, ...], most: int) -> list[tuple[int, int]]:
    """Where each row begins and ends; neighboring rows of at most ``most`` tokens in all count as one."""
    spans = [(0, 0)]
    for length in lengths:
        begin, end = spans[-1]
        if end + length - begin <= most:
            spans[-1] = (begin, end + length)
        else:
            spans.append((end, end + length))
    return [span for span in spans if span[1] > span[0]]


def _grouped(bias: mx.array, heads: int, kv_heads: int, length: int) -> mx.array:
    """A bias that broadcasts to (B, H, T, S), reshaped to broadcast to (B, K, H / K · T, S)."""
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    batch, own_heads, rows, keys = bias.shape
    group = heads // kv_heads
    if own_heads == 1:
        return mx.concatenate([bias] * group, axis=2) if rows > 1 and group > 1 else bias
    each = mx.broadcast_to(bias, (batch, heads, length, keys))
    return each.reshape(batch, kv_heads, group * length, keys)


def _attention(tiles: list[_Tile], scale: float) -> Callable[..., Any]:
    """A function of (queries, keys, values): the result, and what its gradient needs.

    For each tile these are the exponentials (B, K, H / K · t, S) and one over their sums. Queries that
    share a kv head are stacked, which makes one product and no copy of the keys. A fourth argument,
    which broadcasts to (B, K, H / K · T, S), is added to the scores; there is a single tile then.
    """

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array, *bias: mx.array) -> tuple[mx.array, ...]:
        group = queries.shape[1] // keys.shape[1]
        queries, keys, values = queries * scale, mx.contiguous(keys), mx.contiguous(values)
        parts, kept = [], []
        for tile in tiles:
            rows = _rows(queries, group, tile)  # (B, K, H / K · t, E)
            scores = rows @ tile.seen(keys).swapaxes(-1, -2)  # (B, K, H / K · t, S)
            e = _exp_scores(scores, tile, group, bias)
            inverse = 1.0 / row_sums(e)  # (B, K, H / K · t, 1)
            parts.append((e @ tile.seen(values)) * inverse)  # (B, K, H / K · t, E)
            kept += [e, inverse]
        return _join(parts, group), *kept

    @attend.vjp
    def attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        queries, keys, values, *bias = primals
        dy, kept = cotangents[0], outputs[1:]  # (B, H, T, E)
        group = queries.shape[1] // keys.shape[1]
        keys, values = mx.contiguous(keys), mx.contiguous(values)
        layers = layers_for(dy)
        along = row_sums(dy * outputs[0])  # (B, H, T, 1); computed only where it is used
        parts: list[mx.array] = []
        dk, dv = _Sum(), _Sum()
        for tile, e, inverse in zip(tiles, kept[::2], kept[1::2], strict=True):
            dout = _rows(dy, group, tile) * inverse  # (B, K, H / K · t, E)
            de = dout @ tile.seen(values).swapaxes(-1, -2)  # (B, K, H / K · t, S)
            if layers is None:
                dscores = e * (de - _rows(along, group, tile) * inverse)
            else:
                dscores = layers.softmax_back(e, de)
            parts.append(dscores @ tile.seen(keys))  # (B, K, H / K · t, E)
            dk.add(tile.first, dscores.swapaxes(-1, -2) @ _rows(queries, group, tile))  # (B, K, S, E)
            dv.add(tile.first, e.swapaxes(-1, -2) @ dout)  # (B, K, S, E)
        dq = _join(parts, group) * scale
        return dq, dk.whole() * scale, dv.whole(), *(_summed_to(added, dscores) for added in bias)

    return cast(Callable[..., Any], attend)


def _exp_scores(scores: mx.array, tile: _Tile, group: int, added: Sequence[mx.array]) -> mx.array:
    """Exponentials of the scores (B, K, H / K · t, S), after adding biases and subtracting row maxima."""
    exp_rows = lent("exp_rows")
    if exp_rows is not None and tile.causal:
        return cast(mx.array, exp_rows(scores, tile.stop - tile.start))
    if tile.bias is not None:
        scores = scores + mx.concatenate([tile.bias] * group)
    for bias in added:
        scores = scores + bias
    if exp_rows is not None:
        return cast(mx.array, exp_rows(scores, 0))
    return exp(scores - scores.max(axis=-1, keepdims=True))


def _summed_to(target: mx.array, x: mx.array) -> mx.array:
    """``x`` summed over the axes along which ``target`` was broadcast to it."""
    axes = [axis for axis, size in enumerate(target.shape) if size != x.shape[axis]]
    return x.sum(axis=axes, keepdims=True) if axes else x


def _rows(x: mx.array, group: int, tile: _Tile) -> mx.array:
    """The tile's rows of (B, H, T, E), with the heads of a group stacked: (B, K, H / K · t, E)."""
    batch, heads, _, width = x.shape
    return x[:, :, tile.start : tile.stop].reshape(batch, heads // group, -1, width)


def _join(parts: list[mx.array], group: int) -> mx.array:
    """The concatenated tiles (B, K, H / K · t, E), as (B, H, T, E)."""
    batch, kv_heads, _, width = parts[0].shape
    split = [part.reshape(batch, kv_heads * group, -1, width) for part in parts]  # (B, H, t, E) each
    return split[0] if len(split) == 1 else mx.concatenate(split, axis=2)


class _Sum:
    """A sum of parts (B, K, ·, E) that begin at given keys; beginnings and ends never decrease."""

    def __init__(self) -> None:
        self._done: list[mx.array] = []  # keys that no further part covers
        self._open: mx.array | None = None
        self._begin = 0  # the first key of the open part

    def add(self, first: int, part: mx.array) -> None:
        """Add a part that begins at key ``first``."""
        if self._open is not None:
            held = self._open.shape[2]
            cut = min(first - self._begin, held)
            if cut:
                self._done.append(self._open[:, :, :cut])
            both = held - cut
            sums = self._open[:, :, cut:] + part[:, :, :both] if both else part[:, :, :0]
            part = mx.concatenate([sums, part[:, :, both:]], axis=2)
        self._open, self._begin = part, first

    def whole(self) -> mx.array:
        """The sum, from the first key to the last."""
        assert self._open is not None
        return mx.concatenate([*self._done, self._open], axis=2) if self._done else self._open
