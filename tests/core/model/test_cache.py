"""The key-value cache: it holds what went in, and does not copy it for every token."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.model.cache import KVCache

SHAPE = (2, 3, 5)  # B, K, E


def some(tokens: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    batch, heads, width = SHAPE
    return mx.array(np.random.default_rng(seed).standard_normal((batch, heads, tokens, width))).astype(dtype)


def same(one: mx.array, two: mx.array) -> bool:
    return one.shape == two.shape and mx.array_equal(one, two).item() is True


@pytest.mark.parametrize(
    "lengths",
    [
        [1] * 9,
        [7, 1, 1],
        [KVCache.step, 1],
        [KVCache.step - 1, 1, 1, 1],
        [300, 2, 600, 1],
        [3 * KVCache.step],
    ],
)
def test_it_returns_all_that_went_in(lengths: list[int]) -> None:
    keys, values = some(sum(lengths), 1), some(sum(lengths), 2)
    cache, start = KVCache(), 0
    for length in lengths:
        stop = start + length
        got = cache.update(keys[:, :, start:stop], values[:, :, start:stop])
        assert cache.offset == stop
        assert same(got[0], keys[:, :, :stop])
        assert same(got[1], values[:, :, :stop])
        start = stop


@pytest.mark.parametrize("evaluate", [True, False], ids=["evaluated", "lazy"])
def test_what_was_returned_stays_as_it_was(evaluate: bool) -> None:
    """A later token does not write into keys that somebody still holds."""
    cache = KVCache()
    first = cache.update(some(4, 1), some(4, 2))
    if evaluate:
        mx.eval(first)
    second = cache.update(some(1, 3), some(1, 4))
    cache.update(some(1, 5), some(1, 6))
    assert same(first[0], some(4, 1)) and same(first[1], some(4, 2))
    assert same(second[0], mx.concatenate([some(4, 1), some(1, 3)], axis=2))


def test_what_went_in_stays_as_it_was() -> None:
    keys = some(KVCache.step, 1)
    cache = KVCache()
    mx.eval(cache.update(keys, keys))
    mx.eval(cache.update(some(1, 2), some(1, 2)))
    assert same(keys, some(KVCache.step, 1))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_types_are_kept(dtype: mx.Dtype) -> None:
    cache = KVCache()
    keys, values = cache.update(some(3, dtype=dtype), some(3, dtype=dtype))
    assert (keys.dtype, values.dtype) == (dtype, dtype)


def test_keys_and_values_may_differ_in_width() -> None:
    cache = KVCache()
    keys, values = cache.update(mx.ones((1, 2, 3, 4)), mx.ones((1, 2, 3, 6)))
    assert (keys.shape, values.shape) == ((1, 2, 3, 4), (1, 2, 3, 6))


def test_two_caches_share_nothing() -> None:
    one, two = KVCache(), KVCache()
    one.update(some(2, 1), some(2, 1))
    assert two.offset == 0
    assert same(two.update(some(3, 2), some(3, 2))[0], some(3, 2))


def test_a_token_copies_nothing_but_itself() -> None:
    """Memory rises by less than a hundredth of a buffer, except every ``step`` tokens."""
    held, heads, width = 7 * KVCache.step, 2, 64
    past, token = mx.zeros((1, heads, held, width)), mx.ones((1, heads, 1, width))
    mx.eval(past, token)
    cache = KVCache()
    mx.eval(cache.update(past, past))
    grew = []
    for count in range(2 * KVCache.step):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval([a.sum() for a in cache.update(token, token)])
        if mx.get_peak_memory() - before > past.nbytes / 100:
            grew.append(count)
    assert grew == [0, KVCache.step]
