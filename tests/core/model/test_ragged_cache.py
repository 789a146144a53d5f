"""Rows of different lengths on shelves: they are what went in, wherever they are put and whoever leaves."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.model.ops.ragged import RaggedCache, attention_to_seen
from mlxlora_core.model.ragged_cache import RaggedRows, room_for

LAYERS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8


class Row:
    """What has gone in for a row, by numpy."""

    def __init__(self, draw: np.random.Generator, length: int) -> None:
        self.draw = draw
        self.held = [[self.some(KV_HEADS, length) for _ in range(2)] for _ in range(LAYERS)]

    def some(self, heads: int, length: int) -> np.ndarray:
        return self.draw.standard_normal((1, heads, length, WIDTH)).astype(np.float32)

    def attended(self, layer: int, query: np.ndarray, window: int | None, cap: float | None) -> np.ndarray:
        """Attention (1, H, 1, E) of one query to all that is held, in double precision."""
        keys, values = (np.repeat(x.astype(np.float64), HEADS // KV_HEADS, axis=1) for x in self.held[layer])
        scores = 0.3 * query.astype(np.float64) @ keys.swapaxes(-1, -2)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        if window is not None:
            scores[..., : max(0, scores.shape[-1] - window)] = -np.inf
        e = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return (e / e.sum(axis=-1, keepdims=True)) @ values


def held(row: Row) -> list[tuple[mx.array, mx.array]]:
    return [(mx.array(keys), mx.array(values)) for keys, values in row.held]


def step(cache: RaggedRows, rows: dict[int, Row], spare: int) -> None:
    """A token of each row through all layers, each compared with numpy."""
    order, entries = cache.step(len(rows) + spare)
    assert sorted(order) == sorted(rows)
    first: Any = entries[0]  # a RaggedCache, which is no Cache by its types
    assert first.offset.each == (*(rows[row].held[0][0].shape[2] for row in order), *[0] * spare)
    for layer, entry in enumerate(entries):
        assert isinstance(entry, RaggedCache)
        window, cap = ((None, None), (5, 2.0))[layer]
        new = [[rows[row].some(heads, 1) for row in order] for heads in (HEADS, KV_HEADS, KV_HEADS)]
        padding = [[np.ones_like(each[0])] * spare if each else [] for each in new]
        q, k, v = (mx.array(np.concatenate([*each, *more])) for each, more in zip(new, padding, strict=True))
        out = np.array(entry.attend(q, k, v, 0.3, window, cap))
        for place, row in enumerate(order):
            for side, x in zip((0, 1), new[1:], strict=True):
                rows[row].held[layer][side] = np.concatenate([rows[row].held[layer][side], x[place]], axis=2)
            want = rows[row].attended(layer, new[0][place], window, cap)
            np.testing.assert_allclose(out[place : place + 1], want, atol=2e-6)
        assert not out[len(order) :].any()


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_and_go_are_what_went_in(seed: int) -> None:
    draw, choose = np.random.default_rng(seed), random.Random(seed)
    cache, rows, count = RaggedRows(LAYERS), dict[int, Row](), 0
    for _ in range(40):
        if len(rows) < 9 and choose.random() < 0.6:
            rows[count] = Row(draw, choose.choice([1, 2, 60, 63, 64, 120, 127, 250, 256, 300]))
            cache.add(count, held(rows[count]))
            count += 1
        if rows and choose.random() < 0.3:
            gone = choose.choice(list(rows))
            del rows[gone]
            cache.remove(gone)
        assert len(cache) == len(rows)
        if rows:
            step(cache, rows, choose.randrange(3))


def test_shelves_are_at_most_twice_as_wide_as_a_short_row_and_half_more_than_a_long_one() -> None:
    for tokens in range(1, 5000):
        room = room_for(tokens)
        assert tokens <= room <= max(64, 2 * tokens)
        assert room <= 1.5 * tokens + 256 and room_for(room) == room


def test_nothing_is_held_of_rows_that_are_gone() -> None:
    draw = np.random.default_rng(0)
    cache = RaggedRows(LAYERS)
    mx.clear_cache()
    before = mx.get_active_memory()
    for row in range(6):
        cache.add(row, held(Row(draw, 50 * row + 1)))
    assert mx.get_active_memory() > before
    for row in range(6):
        cache.remove(row)
    assert mx.get_active_memory() == before


def test_what_is_not_seen_changes_no_bit() -> None:
    """Whatever stands in a row behind its tokens."""
    draw = np.random.default_rng(0)
    q, k, v = (mx.array(draw.standard_normal((2, 2, size, 8)).astype(np.float32)) for size in (1, 64, 64))
    seen = (mx.arange(64) < mx.array([[9], [64]]))[:, None, None]
    got = attention_to_seen(q, k, v, 0.3, seen, None)
    k[0, :, 9:], v[0, :, 9:] = 1e6, -1e6
    assert mx.array_equal(attention_to_seen(q, k, v, 0.3, seen, None), got)
    assert mx.array_equal(attention_to_seen(q[:1], k[:1], v[:1], 0.3, seen[:1], None), got[:1])
