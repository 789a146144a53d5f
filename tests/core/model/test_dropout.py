"""What rows drop: the numbers it is drawn by, what these hang on, how even and how independent they are."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora_core.model.dropout import (
    Dropout,
    at_positions,
    drops,
    name_dropouts,
    using_keys,
    with_current_keys,
)
from mlxlora_core.training.batches import Batch
from mlxlora_core.training.dropout_keys import dropout_keys

P, T, F = 0.1, 64, 256


def batch(height: int, width: int, lengths: tuple[int, ...] | None = None) -> Batch:
    nothing = mx.zeros((0,), mx.uint32)
    return Batch(mx.zeros((height, width), mx.uint32), nothing, nothing, lengths=lengths)


def named(name: str, p: float = P) -> Dropout:
    module: Any = nn.Module()
    module[name] = Dropout(p)
    name_dropouts(module)
    return module[name]


def kept(
    rows: list[int], width: int = T, *, key: int = 5, name: str = "a", features: int = F, p: float = P
) -> Any:
    """Whether numbers are kept, (B, T, F)."""
    with using_keys(dropout_keys(key, rows, batch(len(rows), width))):
        return np.array(named(name, p)(mx.ones((len(rows), width, features)))) != 0


# --- the numbers, written down in numpy ---------------------------------------


def threefry(key: Any, counters: Any) -> Any:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011), of keys (N, 2) and counters (M, 2): (N, M, 2)."""
    turns = (13, 15, 26, 6, 17, 29, 16, 24)
    first, second = (key[:, None, i].astype(np.uint32) for i in (0, 1))
    schedule = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    x, y = counters[None, :, 0] + first, counters[None, :, 1] + second
    for part in range(5):
        for turn in turns[:4] if part % 2 == 0 else turns[4:]:
            x = x + y
            y = (y << np.uint32(turn) | y >> np.uint32(32 - turn)) ^ x
        x, y = x + schedule[(part + 1) % 3], y + schedule[(part + 2) % 3] + np.uint32(part + 1)
    return np.stack([x, y], -1)


def test_the_numbers_are_those_of_threefry_by_place_and_name() -> None:
    import hashlib

    rows, width, features = [3, 70000], 5, 12
    name = int.from_bytes(hashlib.sha256(b"a").digest()[:8], "little")
    firsts = [np.random.Philox(key=np.array([5, row], np.uint64)).random_raw() for row in rows]
    words = (np.array(firsts, np.uint64)[:, None] + np.arange(width, dtype=np.uint64)).reshape(-1)
    keys = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], -1).astype(np.uint32)
    keys ^= np.array([name >> 32, name & 0xFFFFFFFF], np.uint32)
    half = features // 4  # words of 16 bits, two to a word of the generator and two words to a round
    counters = np.stack([np.arange(half), np.arange(half) + half], -1).astype(np.uint32)
    with np.errstate(over="ignore"):
        drawn = threefry(keys, counters).swapaxes(1, 2).reshape(len(keys), -1)
    want = np.ascontiguousarray(drawn).view(np.uint16).reshape(2, width, features) >= round(P * 65536)
    assert np.array_equal(kept(rows, width, features=features), want)


# --- what they hang on --------------------------------------------------------


def test_a_row_drops_the_same_beside_other_rows_and_behind_any_padding() -> None:
    alone = kept([7])
    assert np.array_equal(kept([3, 7, 9])[1], alone[0])
    assert np.array_equal(kept([3, 7], 3 * T)[1, :T], alone[0])
    assert np.array_equal(kept([7], 5)[0], alone[0, :5])


def test_packed_rows_drop_what_they_drop_apart() -> None:
    lengths = (5, T, 9)
    with using_keys(dropout_keys(5, [3, 7, 9], batch(1, sum(lengths), lengths))):
        packed = np.array(named("a")(mx.ones((1, sum(lengths), F))))[0] != 0
    for row, part in zip([3, 7, 9], np.split(packed, np.cumsum(lengths)[:-1]), strict=True):
        assert np.array_equal(part, kept([row], len(part))[0])


def test_rows_that_only_fill_a_shape_are_the_first_again() -> None:
    words = np.array(dropout_keys(5, [3, 7], batch(4, T)))
    assert np.array_equal(words[2], words[0]) and np.array_equal(words[3], words[0])


@pytest.mark.parametrize("features", [1, 3, 4, 6, 31])
def test_any_number_of_features(features: int) -> None:
    found = kept([1, 2], features=features)
    assert found.shape == (2, T, features) and 0 < found.mean() < 1


def test_what_is_taken_of_some_places_drops_what_it_drops_among_all() -> None:
    whole, chosen = kept([1, 2, 3]), mx.array([0, 5, T + 1, 3 * T - 1])
    with using_keys(dropout_keys(5, [1, 2, 3], batch(3, T))), at_positions(chosen), at_positions(slice(1, 4)):
        found = np.array(named("a")(mx.ones((3, F)))) != 0
    assert np.array_equal(found, whole.reshape(-1, F)[[5, T + 1, 3 * T - 1]])


def test_more_axes_behind_the_places_and_places_in_one_axis() -> None:
    whole = kept([1, 2], features=4 * F)
    with using_keys(dropout_keys(5, [1, 2], batch(2, T))):
        split = np.array(named("a")(mx.ones((2, T, 4, F)))) != 0
        flat = np.array(named("a")(mx.ones((2 * T, 4 * F)))) != 0
    assert np.array_equal(split.reshape(whole.shape), whole) and np.array_equal(
        flat, whole.reshape(flat.shape)
    )


def test_without_places_or_for_inputs_that_show_none_the_state_of_mlx_draws() -> None:
    module, x = named("a"), mx.ones((6, F))
    found = []
    for _ in range(2):
        mx.random.seed(1)
        with using_keys(dropout_keys(5, [1], batch(1, 4))):  # 6 is not 4
            found.append(np.array(module(x)))
        found.append(np.array(module(x)))
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3])
    assert not np.array_equal(found[0], found[1])
    assert np.mean(found[0] == 0) == pytest.approx(P, abs=0.03)


def test_what_is_called_later_draws_as_where_it_was_made() -> None:
    module, x = named("a"), mx.ones((1, T, F))
    with using_keys(dropout_keys(5, [7], batch(1, T))):
        later = with_current_keys(module)
    assert np.array_equal(np.array(later(x)) != 0, kept([7]))


# --- how even, how independent ------------------------------------------------


@pytest.mark.parametrize("p", [1e-9, 0.001, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_the_share_and_the_mean_hold(p: float) -> None:
    """Within five standard deviations; and the factor is that of the share which is dropped, to the bit."""
    exact = min(max(round(p * 65536), 1), 65535) / 65536
    with using_keys(dropout_keys(9, list(range(8)), batch(8, 4 * T))):
        y = np.array(named("a", p)(mx.ones((8, 4 * T, F))))
    assert np.mean(y == 0) == pytest.approx(exact, abs=5 * (exact * (1 - exact) / y.size) ** 0.5)
    assert np.unique(y[y != 0]) == np.float32(1 / (1 - exact))


def test_places_features_rows_layers_and_steps_are_independent() -> None:
    """No pair of neighbours agrees more often than chance would have it; a chi-squared of all counts."""
    p = 0.5
    base = kept([1, 2], p=p)
    pairs = {
        "features": (base[..., :-1], base[..., 1:]),
        "far features": (base[..., : F // 2], base[..., F // 2 :]),
        "places": (base[:, :-1], base[:, 1:]),
        "rows": (base[0], base[1]),
        "layers": (base, kept([1, 2], p=p, name="b")),
        "steps": (base, kept([1, 2], p=p, key=6)),
        "seeds": (base, kept([1, 2], p=p, key=5 + 2**32)),
        "a row and its neighbour, one place on": (base[0, 1:], base[1, :-1]),
    }
    for what, (one, other) in pairs.items():
        share = np.mean(one == other)
        assert share == pytest.approx(0.5, abs=5 * 0.5 / one.size**0.5), what
    for axes, count in (((0, 1), F), ((0, 2), T)):  # by feature, by place
        dropped = (~base).sum(axis=axes)
        each = base.size / count
        chi = ((dropped - each / 2) ** 2 / (each / 4)).sum()
        assert abs(chi - count) < 5 * (2 * count) ** 0.5


def test_the_gradient_is_that_of_what_was_kept() -> None:
    module, x = named("a"), mx.random.normal((2, T, F))
    with using_keys(dropout_keys(5, [1, 2], batch(2, T))):
        gradient = np.array(mx.grad(lambda x: (3 * module(x)).sum())(x))
    want = kept([1, 2]) * np.float32(65536 / (65536 - round(P * 65536))) * 3
    np.testing.assert_allclose(gradient, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_half_precision(dtype: mx.Dtype) -> None:
    with using_keys(dropout_keys(5, [1], batch(1, T))):
        y = named("a")(mx.ones((1, T, F), dtype))
    assert y.dtype == dtype and np.array_equal(np.array(y.astype(mx.float32))[0] != 0, kept([1])[0])


def test_what_is_not_trained_and_what_drops_nothing_stays() -> None:
    x = mx.random.normal((1, T, F))
    module, none = named("a"), named("a", 0.0)
    assert none(x) is x and drops(module) and not drops(none)
    module.eval()
    assert module(x) is x
    assert "p=0.1" in repr(module)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_no_other_probability(p: float) -> None:
    with pytest.raises(ValueError, match="wanted 0 up to"):
        Dropout(p)
