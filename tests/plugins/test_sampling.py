from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlxlora_samplers import mlxlora_samplers

from mlxlora_core.errors import UsageError
from mlxlora_core.options import parse, plain

SAMPLERS = {spec.name: spec for spec in mlxlora_samplers()}
DRAWS = 2000


def changed(name: str, logits: Any, tokens: Sequence[int] = (), **values: Any) -> mx.array:
    """Logits (B, V) as a sampler changes them."""
    spec = SAMPLERS[name]
    transform = spec.build(parse(spec.options, values, owner=name))
    return transform(mx.array(np.array(logits, dtype=np.float32)), tokens)


def drawn(name: str, logits: Any, key: int = 0, **values: Any) -> list[int]:
    """Ids for logits (B, V)."""
    ids = mx.random.categorical(changed(name, logits, **values), key=mx.random.key(key))
    return [int(token) for token in np.array(ids)]


def support(name: str, chances: list[float], **values: Any) -> set[int]:
    """The tokens that come at all, of tokens with these probabilities."""
    return set(drawn(name, [np.log(chances)] * DRAWS, **values))


def test_defaults() -> None:
    assert {name: plain(spec.options()) for name, spec in SAMPLERS.items()} == {
        "greedy": {},
        "temperature": {"temp": 0.8},
        "top-k": {"temp": 0.8, "k": 40},
        "top-p": {"temp": 0.8, "p": 0.9},
        "min-p": {"temp": 0.8, "p": 0.05},
        "repetition-penalty": {"penalty": 1.2, "window": None},
        "presence-penalty": {"penalty": 0.5, "window": None},
        "frequency-penalty": {"penalty": 0.5, "window": None},
    }


class TestTemperature:
    @pytest.mark.parametrize("name", ["temperature", "top-k", "top-p", "min-p"])
    @pytest.mark.parametrize("temp", [1e-6, 1e-30, 1e-37])
    def test_next_to_nothing_is_the_most_likely(self, name: str, temp: float) -> None:
        assert drawn(name, [[100.0, 101.0, -50.0]] * 20, temp=temp) == [1] * 20

    def test_heat_evens_out(self) -> None:
        counts = np.bincount(drawn("temperature", [[0.0, 100.0]] * DRAWS, temp=1e9), minlength=2)
        assert abs(counts[0] - counts[1]) < 4.5 * DRAWS**0.5

    def test_zero_leaves_the_lowest_of_the_most_likely(self) -> None:
        for name in ("greedy", "temperature", "top-k", "top-p", "min-p"):
            values = {} if name == "greedy" else {"temp": 0}
            got = np.array(changed(name, [[1.0, 5.0, 5.0], [3.0, 3.0, -2.0]], **values))
            assert got.tolist() == [[-np.inf, 5.0, -np.inf], [3.0, -np.inf, -np.inf]]


class TestTopK:
    def test_keeps_k(self) -> None:
        assert support("top-k", [0.1, 0.4, 0.2, 0.3], k=2) == {1, 3}
        assert support("top-k", [0.1, 0.4, 0.2, 0.3], k=3) == {1, 2, 3}

    def test_a_tie_at_the_edge_leaves_exactly_k(self) -> None:
        assert support("top-k", [0.2, 0.2, 0.2, 0.2, 0.2], k=3) == {0, 1, 2}
        assert support("top-k", [0.1, 0.1, 0.6, 0.1, 0.1], k=3) == {0, 1, 2}

    @pytest.mark.parametrize("k", [4, 5, 10**9])
    def test_all_of_the_vocabulary_is_the_temperature_alone(self, k: int) -> None:
        logits = [[0.3, -1.0, 2.0, 0.1]] * 200
        assert drawn("top-k", logits, k=k) == drawn("temperature", logits)


class TestTopP:
    def test_keeps_the_smallest_set_that_reaches_p(self) -> None:
        chances = [0.15, 0.5, 0.05, 0.3]
        for p, want in (
            (0.01, {1}),
            (0.49, {1}),
            (0.51, {1, 3}),
            (0.79, {1, 3}),
            (0.81, {0, 1, 3}),
            (0.96, {0, 1, 2, 3}),
        ):
            assert support("top-p", chances, p=p, temp=1) == want

    def test_counts_after_the_temperature(self) -> None:
        """At 0.9 the first token alone reaches 0.89; heated, it takes the second to get there."""
        assert support("top-p", [0.9, 0.05, 0.05], p=0.89, temp=1) == {0}
        assert support("top-p", [0.9, 0.06, 0.04], p=0.89, temp=2) == {0, 1, 2}
        assert support("top-p", [0.6, 0.4], p=0.65, temp=0.5) == {0}

    def test_one_is_the_temperature_alone(self) -> None:
        logits = np.random.default_rng(0).normal(0, 8, (200, 50))
        assert drawn("top-p", logits, p=1) == drawn("temperature", logits)

    @pytest.mark.parametrize("scale", [0.3, 3.0])
    @pytest.mark.parametrize("ties", [True, False])
    @pytest.mark.parametrize("p", [0.3, 0.9])
    def test_a_few_sorted_tokens_give_the_set_that_all_of_them_give(
        self, scale: float, ties: bool, p: float
    ) -> None:
        """Of 6000 not all are sorted, where 512 are enough. Sums in float32 may be off by a few tokens."""
        logits = np.random.default_rng(2).normal(0, scale, (3, 6000)).astype(np.float32)
        logits = np.round(logits * 4) / 4 if ties else logits
        for row, got in zip(logits, np.array(changed("top-p", logits, p=p, temp=1)), strict=True):
            order = np.argsort(-row, kind="stable")
            chances = np.exp(row[order].astype(np.float64))
            size = int(np.argmax(np.cumsum(chances) >= p * chances.sum())) + 1
            assert (size < 512) == (scale == 3.0)
            kept = np.flatnonzero(got > -np.inf)
            assert abs(len(kept) - size) <= max(1, size // 1000)
            assert set(kept.tolist()) == set(order[: len(kept)].tolist())

    def test_every_row_has_its_own_set(self) -> None:
        logits = np.log([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9]] * 100)
        assert drawn("top-p", logits, p=0.8, temp=1) == [0, 2] * 100


class TestMinP:
    def test_keeps_a_share_of_the_highest(self) -> None:
        chances = [0.5, 0.3, 0.14, 0.06]
        assert support("min-p", chances, p=0.29, temp=1) == {0, 1}
        assert support("min-p", chances, p=0.27, temp=1) == {0, 1, 2}
        assert support("min-p", chances, p=0.1, temp=1) == {0, 1, 2, 3}

    def test_counts_after_the_temperature(self) -> None:
        assert support("min-p", [0.8, 0.2], p=0.4, temp=1) == {0}
        assert support("min-p", [0.8, 0.2], p=0.4, temp=2) == {0, 1}

    def test_ends_of_the_range(self) -> None:
        logits = [[0.3, 2.0, 2.0, -1.0]] * 200
        assert drawn("min-p", logits, p=0) == drawn("temperature", logits)
        assert set(drawn("min-p", logits, p=1)) == {1, 2}


class TestRepetitionPenalty:
    LOGITS = ((2.0, -2.0, 0.0, 6.0, 1.0),)

    def test_divides_what_is_above_0_and_multiplies_what_is_below(self) -> None:
        got = np.array(changed("repetition-penalty", self.LOGITS, [0, 1, 2], penalty=2.0))
        assert got.tolist() == [[1.0, -4.0, 0.0, 6.0, 1.0]]

    def test_how_often_a_token_came_does_not_count(self) -> None:
        once = changed("repetition-penalty", self.LOGITS, [3, 0])
        assert mx.array_equal(changed("repetition-penalty", self.LOGITS, [3, 3, 0, 3]), once)

    def test_a_window_forgets(self) -> None:
        got = np.array(changed("repetition-penalty", self.LOGITS, [0, 3, 3, 4], penalty=2.0, window=2))
        assert got.tolist() == [[2.0, -2.0, 0.0, 3.0, 0.5]]
        long = changed("repetition-penalty", self.LOGITS, [0, 3], window=99)
        assert mx.array_equal(long, changed("repetition-penalty", self.LOGITS, [0, 3]))

    def test_one_and_no_ids_change_nothing(self) -> None:
        for tokens, penalty in (((0, 1, 3), 1.0), ((), 2.0)):
            got = changed("repetition-penalty", self.LOGITS, tokens, penalty=penalty)
            assert np.array(got).tolist() == [list(row) for row in self.LOGITS]

    def test_what_is_ruled_out_stays_so(self) -> None:
        got = np.array(changed("repetition-penalty", [[-np.inf, 1.0]], [0, 1], penalty=2.0))
        assert got.tolist() == [[-np.inf, 0.5]]

    def test_it_ends_a_loop(self) -> None:
        """Of two tokens that a greedy reader would repeat for good, the second comes."""
        row, tokens = [[2.0, 1.9, -1.0]], [2]
        for _ in range(2):
            less = changed("repetition-penalty", row, tokens, penalty=1.5)
            tokens.append(int(mx.argmax(changed("greedy", np.array(less)))))
        assert tokens == [2, 0, 1]


class TestPresenceAndFrequencyPenalty:
    @pytest.mark.parametrize("name", ["presence-penalty", "frequency-penalty"])
    @pytest.mark.parametrize(
        ("penalty", "window"), [(0.7, None), (-1.5, 3), (2.0, 1), (0.0, None), (1.1, 99)]
    )
    def test_it_is_that_of_numpy_in_float64(self, name: str, penalty: float, window: int | None) -> None:
        draw = np.random.default_rng(5)
        for length in (1, 2, 7, 40):
            logits = draw.normal(0, 4, (3, 11))
            tokens = draw.integers(0, 11, length).tolist()
            times = np.bincount(tokens if window is None else tokens[-window:], minlength=11)
            counted = (times > 0).astype(np.float64) if name == "presence-penalty" else times
            got = np.array(changed(name, logits, tokens, penalty=penalty, window=window))
            np.testing.assert_allclose(got, logits - penalty * counted, rtol=1e-6, atol=1e-5)

    @pytest.mark.parametrize("name", ["presence-penalty", "frequency-penalty"])
    def test_no_ids_change_nothing_and_what_is_ruled_out_stays_so(self, name: str) -> None:
        assert np.array(changed(name, [[-np.inf, 1.0]], [])).tolist() == [[-np.inf, 1.0]]
        assert np.array(changed(name, [[-np.inf, 1.0]], [0, 0, 1], penalty=1)).tolist() == [[-np.inf, 0.0]]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_vocabulary_of_real_size(name: str) -> None:
    logits = np.random.default_rng(1).normal(0, 3, (2, 32000))
    logits[:, 777] = 60.0
    assert drawn(name, logits) == [777, 777]


def test_an_option_of_another_sampler_is_refused() -> None:
    with pytest.raises(UsageError, match="has no option 'k'"):
        drawn("top-p", [[0.0]], k=3)
