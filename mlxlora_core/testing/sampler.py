"""The conformance suite of samplers.

Subclass :class:`SamplerSuite` in a test file and run it with pytest::

    class TestMySampler(SamplerSuite):
        spec = my_plugin.SAMPLER
        option_sets = ({}, {"temp": 0.5})
        bad_options = ({"temp": -1},)

        def probabilities(self, logits, tokens, options): ...

One that asks for the tokenizer is given a small one, and logits over its ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.errors import UsageError
from mlxlora_core.model.drawing import Drawing
from mlxlora_core.options import parse
from mlxlora_core.plugins import Component, Plugin, asks_for, transform_of
from mlxlora_core.specs import Sampler
from mlxlora_core.testing.small_tokenizer import SmallTokenizer
from mlxlora_core.values import Tokenizer, Transform

_INF = math.inf
_LONGEST = 24  # tokens of the longest text that is drawn

#: logits (V,) that a sampler may meet, by what is special about them
LOGITS: Mapping[str, Sequence[float]] = {
    "spread": [1.5, -0.3, 0.2, 2.1, -4.0, 0.9, 1.2, -1.1, 0.0, 1.9],
    "one token": [3.0],
    "all equal": [0.7] * 6,
    "ties": [1.0, 2.0, 2.0, 0.0, 2.0, 1.0, 1.0],
    "ruled out": [-_INF, 1.0, -_INF, 0.5, 0.2, -_INF],
    "one left": [-_INF, -_INF, -5.0, -_INF],
    "far apart": [300.0, -300.0, 299.0, 298.5, 0.0],
}

#: ids that may stand before a token, by what is special about them; of a smaller vocabulary, modulo it
HISTORIES: Mapping[str, Sequence[int]] = {
    "a begin token": [1],
    "some tokens": [1, 2, 3, 4, 3],
    "every token, often": list(range(10)) * 30,
}


class SamplerSuite:
    """What every sampler must do.

    Attributes:
        spec: the sampler.
        option_sets: option values to try.
        bad_options: option values that must be refused.
        tokenizer: what it is given where it asks for one.
        draws: tokens that a distribution is judged by.
    """

    spec: Sampler
    option_sets: Sequence[Mapping[str, Any]] = ({},)
    bad_options: Sequence[Mapping[str, Any]] = ()
    tokenizer: Tokenizer = SmallTokenizer()
    draws = 8000

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray | None:
        """The probability (V,) of each token of a text that goes on from ``tokens``, or None if unknown.

        Computed independently of the sampler. Without it no distribution is judged.

        Args:
            logits: (V,), float64, with -inf for tokens that are ruled out.
            tokens: the ids so far.
            options: to sample with.
        """
        return None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every set of options, and refuse every bad one."""
        for name, sets in (("values", self.option_sets), ("bad", self.bad_options)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, sets, ids=[str(dict(values)) for values in sets])

    # --- what the tests are made of ---

    def options(self, values: Mapping[str, Any]) -> Any:
        """The options that a recipe with these values gives."""
        return parse(self.spec.options, values, owner=self.spec.name)

    def build(self, values: Mapping[str, Any]) -> Transform:
        """A transform for one text."""
        return transform_of(self._component(), self.options(values), self.tokenizer)

    def change(self, values: Mapping[str, Any], logits: Any, tokens: Sequence[int]) -> np.ndarray:
        """Logits (B, V) as a sampler that is built for them changes them."""
        return np.array(self.build(values)(_float32(logits), tuple(tokens)))

    def drawing(self, values: Mapping[str, Any], seed: int = 0) -> Drawing:
        """What mlxlora draws the tokens of a text with; it checks what the functions give."""
        return Drawing([(self._component(), self.options(values))], seed, self.tokenizer)

    def text(self, values: Mapping[str, Any], length: int, seed: int = 0) -> list[int]:
        """So many ids, drawn one after the other from logits that depend on the one before."""
        return self._grown([self.drawing(values, seed)], length)[0]

    def logits(self, kind: str) -> Sequence[float]:
        """A row of :data:`LOGITS`, repeated to the length of the vocabulary where it asks for a tokenizer."""
        row = LOGITS[kind]
        return list(np.resize(row, self.tokenizer.vocab_size)) if self._asks() else row

    # --- the tests ---

    @pytest.mark.parametrize("history", HISTORIES)
    @pytest.mark.parametrize("kind", LOGITS)
    def test_gives_logits_that_leave_a_token(
        self, values: Mapping[str, Any], kind: str, history: str
    ) -> None:
        """Logits (B, V) in float32, for one row or several; what was ruled out stays so.

        One that knows the tokenizer may leave none where all that it lets come were ruled out.
        """
        row, tokens = self.logits(kind), _ids(history, self.logits(kind))
        free = self.change(values, [[0.0] * len(row)], tokens)[0] if self._asks() else np.zeros(len(row))
        assert (free > -_INF).any(), "forbids every token where all may come"
        leaves = ((free > -_INF) & (np.array(row) > -_INF)).any()
        for count in (1, 3):
            logits = _float32([row] * count)
            changed = self.build(values)(logits, tokens)
            assert isinstance(changed, mx.array)
            assert (changed.shape, changed.dtype) == (logits.shape, mx.float32)
            got = np.array(changed)
            assert not np.isnan(got).any() and not np.isposinf(got).any(), f"gives {got}"
            assert (got > -_INF).any(axis=-1).all() == leaves, "forbids every token"
            assert not (got[:, np.array(row) == -_INF] > -_INF).any(), "allows what was forbidden"
        if leaves:
            assert row[self.drawing(values)(_float32([row]), tokens)] > -_INF

    def test_logits_are_left_as_they_are(self, values: Mapping[str, Any]) -> None:
        """It gives others, and changes nothing of those that it is given."""
        given = _float32([self.logits("spread")])
        before = np.array(given)
        self.build(values)(given, HISTORIES["some tokens"])
        assert np.array_equal(np.array(given), before)

    def test_extreme_options_leave_a_token(self, values: Mapping[str, Any]) -> None:
        """The least and the most that an option may be leave a token, whatever the logits."""
        for name, bound in extremes(self.spec.options):
            try:
                options = self.options({**values, name: bound})
            except UsageError:  # not beside the other options
                continue
            for kind in LOGITS:
                row = self.logits(kind)
                changed = transform_of(self._component(), options, self.tokenizer)(_float32([row]), (1,))
                got = np.array(changed)
                assert not np.isnan(got).any(), f"{name}={bound}: gives {got}"
                assert self._asks() or (got > -_INF).any(), f"{name}={bound}: forbids every token"

    def test_every_row_is_changed_by_itself(self, values: Mapping[str, Any]) -> None:
        """A row of a batch comes out as it does alone."""
        spread = self.logits("spread")
        sharp = [9 * logit for logit in spread]  # one token is nearly certain, which no other row may see
        rows = [spread, spread[::-1], [0.0] * len(spread), sharp]
        tokens = HISTORIES["some tokens"]
        together = self.change(values, rows, tokens)
        alone = [self.change(values, [row], tokens)[0] for row in rows]
        assert np.allclose(together, alone, atol=1e-5)

    def test_nothing_is_random_in_it(self, values: Mapping[str, Any]) -> None:
        """The same logits and ids give the same: only mlxlora draws, by the seed."""
        row, tokens = [self.logits("spread")], HISTORIES["some tokens"]
        first = self.change(values, row, tokens)
        for seed in (1, 2, 3):
            mx.random.seed(seed)
            assert np.array_equal(self.change(values, row, tokens), first)

    def test_same_seed_same_text_whatever_the_length(self, values: Mapping[str, Any]) -> None:
        """A text that is asked for longer begins with the shorter one."""
        long = self.text(values, _LONGEST)
        assert len(long) == _LONGEST
        for length in (1, 2, 7):
            assert self.text(values, length) == long[:length]

    def test_texts_know_nothing_of_each_other(self, values: Mapping[str, Any]) -> None:
        """Two texts that grow by turns are those that grow one after the other: state belongs to a text."""
        seeds = (3, 4)
        one_by_one = [self.text(values, _LONGEST, seed) for seed in seeds]
        assert self._grown([self.drawing(values, seed) for seed in seeds], _LONGEST) == one_by_one

    @pytest.mark.parametrize("kind", LOGITS)
    def test_temperature_zero_is_the_most_likely(self, values: Mapping[str, Any], kind: str) -> None:
        """With ``temp`` 0 the most likely token alone is left."""
        if "temp" not in {field.name for field in dataclasses.fields(self.spec.options)}:
            pytest.skip("it has no option temp")
        row = self.logits(kind)
        for logits in (row, row[::-1]):
            changed = self.change({**values, "temp": 0}, [logits], _ids("a begin token", row))[0]
            left = [value for value, after in zip(logits, changed, strict=True) if after > -_INF]
            assert len(left) == 1 and (self._asks() or left == [max(row)])

    @pytest.mark.parametrize("history", HISTORIES)
    @pytest.mark.parametrize("kind", LOGITS)
    def test_distribution(self, values: Mapping[str, Any], kind: str, history: str) -> None:
        """Tokens come as often as they should, by a chi-square test with fixed keys.

        An honest sampler fails one such test in 100 000; the keys are fixed, so
        that it passes or fails for good.
        """
        want = self._chances(kind, history, values)
        if want is None:
            pytest.skip("the suite says no probabilities")
        assert math.isclose(want.sum(), 1, rel_tol=1e-9)
        changed = self.change(values, [self.logits(kind)], _ids(history, self.logits(kind)))
        ids = mx.random.categorical(mx.array(changed[0]), num_samples=self.draws, key=mx.random.key(7))
        counts = np.bincount(np.array(ids), minlength=len(want))
        assert counts[want == 0].sum() == 0, f"drew a token of no probability: {counts}, wanted {want}"
        statistic, freedom = _chi_square(counts, want * self.draws)
        assert statistic <= _limit(freedom), f"drew {counts}, wanted about {want * self.draws}"

    def test_refuses_what_makes_no_sense(self, bad: Mapping[str, Any]) -> None:
        """A value out of its range is an error before anything is sampled."""
        with pytest.raises(UsageError):
            self.options(bad)

    def _chances(self, kind: str, history: str, values: Mapping[str, Any]) -> np.ndarray | None:
        row = self.logits(kind)
        return self.probabilities(np.array(row, np.float64), _ids(history, row), self.options(values))

    def _component(self) -> Component:
        return Component("sampler", self.spec, Plugin("suite", "suite", "", "file", "suite"))

    def _asks(self) -> bool:
        return asks_for("tokenizer", self.spec.build)

    def _grown(self, drawings: Sequence[Drawing], length: int) -> list[list[int]]:
        """Texts of so many ids, a token of each by turns, from logits that depend on the last id."""
        size = self.tokenizer.vocab_size if self._asks() else 12
        table = np.random.default_rng(0).normal(0, 1.5, (size, size)).astype(np.float32)
        texts = [[1] for _ in drawings]
        for _ in range(length):
            for drawing, tokens in zip(drawings, texts, strict=True):
                tokens.append(drawing(mx.array(table[tokens[-1] : tokens[-1] + 1]), tokens))
        return [tokens[1:] for tokens in texts]


def extremes(options: type[Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of the least and the most that each number among some options may be."""
    for field in dataclasses.fields(options):
        for bound in ("minimum", "maximum"):
            value = field.metadata.get(bound)
            if isinstance(value, int | float):
                yield field.name, value


def _float32(logits: Any) -> mx.array:
    return mx.array(np.array(logits, dtype=np.float32))


def _ids(history: str, row: Sequence[float]) -> tuple[int, ...]:
    """A history, in ids of the vocabulary that ``row`` has."""
    return tuple(token % len(row) for token in HISTORIES[history])


def _chi_square(counts: np.ndarray, want: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells that expect fewer than 5 are one."""
    rare = want < 5
    cells = [(counts[rare].sum(), want[rare].sum()), *zip(counts[~rare], want[~rare], strict=True)]
    cells = [(got, expected) for got, expected in cells if expected > 0]
    return sum((got - expected) ** 2 / expected for got, expected in cells), len(cells) - 1


def _limit(freedom: int, z: float = 4.265) -> float:
    """What chi-square exceeds with probability 1e-5 (Wilson and Hilferty 1931)."""
    if freedom == 0:
        return 1e-9
    part = 2 / (9 * freedom)
    return float(freedom * (1 - part + z * part**0.5) ** 3)
