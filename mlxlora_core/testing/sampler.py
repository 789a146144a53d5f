"""The conformance suite of samplers.

Subclass :class:`SamplerSuite` in a test file and run it with pytest::

    class TestMySampler(SamplerSuite):
        spec = my_plugin.SAMPLER
        option_sets = ({}, {"temp": 0.5})
        bad_options = ({"temp": -1},)

        def probabilities(self, logits, options): ...
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.errors import UsageError
from mlxlora_core.options import parse
from mlxlora_core.specs import Sampler

_INF = math.inf

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


class SamplerSuite:
    """What every sampler must do.

    Attributes:
        spec: the sampler.
        option_sets: option values to try.
        bad_options: option values that must be refused.
        draws: tokens that a distribution is judged by; a multiple of 8.
    """

    spec: Sampler
    option_sets: Sequence[Mapping[str, Any]] = ({},)
    bad_options: Sequence[Mapping[str, Any]] = ()
    draws = 8000

    def probabilities(self, logits: np.ndarray, options: Any) -> np.ndarray:
        """The probability (V,) of each token, computed independently of the sampler.

        Args:
            logits: (V,), float64, with -inf for tokens that are ruled out.
            options: to sample with.
        """
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every set of options, and refuse every bad one."""
        for name, sets in (("values", self.option_sets), ("bad", self.bad_options)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, sets, ids=[str(dict(values)) for values in sets])

    # --- what the tests are made of ---

    def options(self, values: Mapping[str, Any]) -> Any:
        """The options that a recipe with these values gives."""
        return parse(self.spec.options, values, owner=self.spec.name)

    def sample(self, values: Mapping[str, Any], logits: Any, key: int = 0) -> np.ndarray:
        """Ids (B,) drawn from logits (B, V)."""
        ids = self.spec.build(self.options(values))(_float32(logits), [1, 2, 3], mx.random.key(key))
        return np.array(ids)

    # --- the tests ---

    @pytest.mark.parametrize("kind", LOGITS)
    def test_gives_one_possible_token_a_row(self, values: Mapping[str, Any], kind: str) -> None:
        """Ids (B,), none of them ruled out."""
        row = LOGITS[kind]
        for count in (1, 3):
            ids = self.sample(values, [row] * count)
            assert ids.shape == (count,)
            assert np.issubdtype(ids.dtype, np.integer)
            assert all(row[token] > -_INF for token in ids)

    def test_same_key_same_token(self, values: Mapping[str, Any]) -> None:
        """Tokens depend on the key and on nothing else."""
        rows = [LOGITS["spread"]] * 64
        want = self.sample(values, rows, key=5)
        mx.random.seed(99)
        assert np.array_equal(self.sample(values, rows, key=5), want)

    def test_another_key_another_token(self, values: Mapping[str, Any]) -> None:
        """Another key draws again, where there is anything to draw."""
        row = LOGITS["spread"]
        if (self.probabilities(np.array(row), self.options(values)) > 0).sum() == 1:
            pytest.skip("only one token is possible")
        drawn = {int(self.sample(values, [row], key=key)[0]) for key in range(64)}
        assert len(drawn) > 1

    @pytest.mark.parametrize("kind", LOGITS)
    def test_temperature_zero_is_the_most_likely(self, values: Mapping[str, Any], kind: str) -> None:
        """With ``temp`` 0 the most likely token comes, whatever the key."""
        if "temp" not in {field.name for field in dataclasses.fields(self.spec.options)}:
            pytest.skip("it has no option temp")
        row = LOGITS[kind]
        for key in range(4):
            got = self.sample({**values, "temp": 0}, [row, row[::-1]], key)
            assert [row[got[0]], row[::-1][got[1]]] == [max(row)] * 2

    @pytest.mark.parametrize("kind", LOGITS)
    def test_distribution(self, values: Mapping[str, Any], kind: str) -> None:
        """Tokens come as often as they should, by a chi-square test with fixed keys.

        An honest sampler fails one such test in 100 000; the keys are fixed, so
        that it passes or fails for good.
        """
        row = LOGITS[kind]
        want = self.probabilities(np.array(row, dtype=np.float64), self.options(values))
        assert math.isclose(want.sum(), 1, rel_tol=1e-9)
        keys = 8
        ids = np.concatenate([self.sample(values, [row] * (self.draws // keys), k) for k in range(keys)])
        counts = np.bincount(ids, minlength=len(row))
        assert counts[want == 0].sum() == 0, f"drew a token of no probability: {counts}, wanted {want}"
        statistic, freedom = _chi_square(counts, want * len(ids))
        assert statistic <= _limit(freedom), f"drew {counts}, wanted about {want * len(ids)}"

    def test_refuses_what_makes_no_sense(self, bad: Mapping[str, Any]) -> None:
        """A value out of its range is an error before anything is sampled."""
        with pytest.raises(UsageError):
            self.options(bad)


def _float32(logits: Any) -> mx.array:
    return mx.array(np.array(logits, dtype=np.float32))


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
