from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.model.stacked_updates import StackedUpdates, mixed
from mlxlora_core.values import LowRank

INPUTS, OUTPUTS = 12, 20


def _update(seed: int, rank: int, scale: float) -> LowRank:
    keys = mx.random.split(mx.random.key(seed))
    a, b = mx.random.normal((INPUTS, rank), key=keys[0]), mx.random.normal((rank, OUTPUTS), key=keys[1])
    return LowRank(a, b, scale)


UPDATES = {"a": _update(1, 2, 2.0), "b": _update(2, 5, -0.5), "c": _update(3, 1, 1.0)}


def _by_numpy(name: str | None, x: mx.array) -> np.ndarray:
    """What a name adds to outputs for inputs (..., inputs), in float64."""
    if name is None:
        return np.zeros((*x.shape[:-1], OUTPUTS))
    update = UPDATES[name]
    a, b = np.array(update.a, np.float64), np.array(update.b, np.float64)
    return update.scale * (np.array(x, np.float64) @ a @ b)


@pytest.fixture
def asked() -> list[str]:
    """Names of the updates that a stack has asked for."""
    return []


@pytest.fixture
def stack(asked: list[str]) -> StackedUpdates:
    """A stack of :data:`UPDATES`."""

    def low_rank(name: str) -> LowRank:
        asked.append(name)
        return UPDATES[name]

    return StackedUpdates(low_rank)


@pytest.mark.parametrize("shape", [(4, INPUTS), (4, 1, INPUTS), (4, 3, INPUTS)])
def test_rows_that_change_from_step_to_step_each_get_their_own(
    stack: StackedUpdates, shape: tuple[int, ...]
) -> None:
    x = mx.random.normal(shape, key=mx.random.key(7))
    y = mx.random.normal((*shape[:-1], OUTPUTS), key=mx.random.key(8))
    for rows in ("aaaa", ("c", None, "a", "a"), ("b", "a", "c", None), ("b", "b", "b", "b"), "abca"):
        got = np.array(stack.by_row(rows)(x, y)) - np.array(y)
        want = np.stack([_by_numpy(name, x[row]) for row, name in enumerate(rows)])
        assert np.abs(got - want).max() <= 1e-5, rows


def test_updates_are_stacked_once_and_not_at_every_step(stack: StackedUpdates, asked: list[str]) -> None:
    for rows in (["a", "b"], ["b", "a"], ["a", "a", "b"], ["b"]):
        stack.by_row(rows)
    assert asked == ["a", "b"]
    stack.by_row(["c"])  # one more, beside those before
    stack.by_row(["a", "c"])
    assert sorted(asked[2:]) == ["a", "b", "c"]


def test_nothing_is_nothing_beside_one_that_is_infinite() -> None:
    odd = LowRank(mx.full((INPUTS, 2), mx.inf), mx.full((2, OUTPUTS), mx.inf), 1.0)
    y = mx.ones((2, 1, OUTPUTS))
    got = StackedUpdates(lambda _: odd).by_row(["odd", None])(mx.ones((2, 1, INPUTS)), y)
    assert mx.array_equal(got[1], y[1])


def test_a_mixture_is_the_sum_of_its_shares() -> None:
    x, y = mx.random.normal((3, INPUTS), key=mx.random.key(9)), mx.ones((3, OUTPUTS))
    got = np.array(mixed([(0.5, UPDATES["a"]), (-2.0, UPDATES["b"])])(x, y))
    assert np.abs(got - 1 - 0.5 * _by_numpy("a", x) + 2 * _by_numpy("b", x)).max() <= 1e-5
