"""Rows that stand one after the other: attention within each and positions that begin again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxlora_core.model import ops
from mlxlora_core.model.ops import cpu_attention
from mlxlora_core.model.ops.rows import Rows, apart, together

HEADS, KV_HEADS, WIDTH, THETA = 4, 2, 16, 500.0
SHORT = (3, 1, 2, 5)
#: two tiles of short rows, a row of several tiles, rows of one and of two tokens, one as long as a tile
LONG = (9, 20, 1, 2, 33, 150, 1, 64, 40, 2)
#: longer than eight tiles
LONGEST = (600, 30, 5)


@pytest.fixture(params=["as it is computed here", "as on a GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test by the ways of a CPU, and by those of a GPU on whatever is here."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(ops, "on_cpu", lambda: False)
    return request.param


def normal(*shape: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: Sequence[int],
    window: int | None,
    cap: float | None,
) -> torch.Tensor:
    """Attention with rotary positions over a mask of all pairs, in float64."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    seen = (row[:, None] == row) & (position <= position[:, None])
    if window is not None:
        seen &= position > position[:, None] - window
    angle = position[:, None] * THETA ** (-np.arange(0, WIDTH, 2) / WIDTH)
    circle = torch.polar(torch.ones(*angle.shape, dtype=torch.float64), torch.tensor(angle))

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (WIDTH // 2, 2)).contiguous())
        return torch.view_as_real(pairs * circle).flatten(-2)

    group = HEADS // KV_HEADS
    keys, values = (x.repeat_interleave(group, dim=1) for x in (turned(keys), values))
    scores = turned(queries) @ keys.transpose(-1, -2) * 0.3
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    return scores.masked_fill(~torch.tensor(seen), -torch.inf).softmax(-1) @ values


def ours(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    lengths: Sequence[int],
    window: int | None,
    cap: float | None,
) -> mx.array:
    mask = ops.attention_mask(sum(lengths), 0, window, lengths)
    place = ops.positions(mask, None)
    queries, keys = ops.rotate(queries, place, THETA), ops.rotate(keys, place, THETA)
    return ops.attention(queries, keys, values, 0.3, mask, cap)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 7, 70])
@pytest.mark.parametrize("lengths", [SHORT, LONG, LONGEST, (1,), (2, 1), (130,)], ids=str)
def test_attention_and_its_gradient_stay_within_a_row(
    way: str, lengths: tuple[int, ...], window: int | None, cap: float | None
) -> None:
    tokens = sum(lengths)
    assert (HEADS * tokens * WIDTH >= ops.LARGE) is (tokens >= 64)
    given = [normal(1, heads, tokens, WIDTH, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    weight = normal(1, HEADS, tokens, WIDTH, seed=9)
    got, gradients = mx.vjp(
        lambda q, k, v: ours(q, k, v, lengths, window, cap), list(map(mx.array, given)), [mx.array(weight)]
    )
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in given]
    want = reference(*tensors, lengths, window, cap)
    want.backward(torch.tensor(weight, dtype=torch.float64))
    bound = 2e-5 if way == "as it is computed here" else 1e-4  # MLX's rope computes angles in float32
    pairs = zip((got[0], *gradients), (want.detach(), *(x.grad for x in tensors)), strict=True)
    for mine, theirs in pairs:
        assert theirs is not None
        np.testing.assert_allclose(np.array(mine), theirs.numpy(), atol=bound, rtol=0)


def test_what_stands_in_another_row_changes_no_bit(way: str) -> None:
    given = [normal(1, heads, sum(LONG), WIDTH, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    start, stop = sum(LONG[:5]), sum(LONG[:6])
    before = ours(*map(mx.array, given), LONG, None, None)
    for part in given:
        part[:, :, start:stop] *= -3
    change = mx.abs(before - ours(*map(mx.array, given), LONG, None, None))
    assert change[:, :, :start].max() == 0 == change[:, :, stop:].max()
    assert change[:, :, start:stop].max() > 0.1


def test_tiles_are_no_larger_than_they_must_be() -> None:
    """No query computes a score with a key of another row, but for rows so short that they share a tile."""
    tiles = cpu_attention._tiles_of_rows(Rows((150, 700, 20, 30, 40), None))
    pairs = sum((tile.stop - tile.start) * (tile.keys - tile.first) for tile in tiles)
    assert [tile.start for tile in tiles] == [0, 64, 128, *range(150, 850, 88), 850, 900]
    assert pairs < 0.6 * (150**2 + 700**2) + 50**2 + 40**2
    within = cpu_attention._tiles_of_rows(Rows((700,), 64))
    assert max(tile.keys - tile.first for tile in within) == 88 + 63


def test_rows_are_taken_apart_and_put_together_again() -> None:
    rows = Rows(LONG)
    x = mx.array(normal(1, 3, sum(LONG), 4, seed=1))
    parts = apart(x, rows)
    assert parts.shape == (len(LONG), 3, max(LONG), 4)
    start = 0
    for i, length in enumerate(LONG):
        assert mx.array_equal(parts[i, :, :length], x[0, :, start : start + length])
        start += length
    assert mx.array_equal(together(parts, rows), x)
    # The ends of shorter rows, which are none, get no gradient.
    gradient = mx.grad(lambda parts: together(parts, rows).square().sum())(parts)
    inside = mx.arange(max(LONG)) < mx.array(LONG)[:, None]
    assert mx.array_equal(gradient, mx.where(inside[:, None, :, None], 2 * parts, 0.0))
    assert mx.array_equal(mx.grad(lambda x: together(apart(x, rows), rows).square().sum())(x), 2 * x)


def test_a_single_row_is_masked_as_it_always_was() -> None:
    assert ops.attention_mask(5, 0, None, [5]) == "causal"
    assert ops.attention_mask(1, 0, 3, [1]) is None
    assert ops.attention_mask(9, 0, None, [4, 5]) == Rows((4, 5))
    assert ops.positions("causal", None) == 0


@pytest.mark.parametrize(
    ("lengths", "tokens", "held"), [((4, 5), 8, 0), ((4, 5), 9, 1), ((4, 0, 5), 9, 0), ((), 0, 0)]
)
def test_lengths_that_are_none_are_refused(lengths: tuple[int, ...], tokens: int, held: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        ops.attention_mask(tokens, held, None, lengths)


@pytest.mark.parametrize("shape", [(1, 8, 9), (2, 9, 9), (1, 9, 10)], ids=str)
def test_rows_that_stand_elsewhere_are_refused(shape: tuple[int, int, int]) -> None:
    batch, tokens, seen = shape
    queries, keys = mx.zeros((batch, 4, tokens, 8)), mx.zeros((batch, 2, seen, 8))
    with pytest.raises(ValueError, match="do not stand in"):
        ops.attention(queries, keys, keys, 0.3, Rows((4, 5)))
