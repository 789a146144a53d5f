"""The conformance suite over every sampler that is registered."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core import plugins as registry
from mlxlora_core.api import DataError, NoOptions, PluginError, Sampler, Transform, option
from mlxlora_core.testing.sampler import SamplerSuite
from mlxlora_core.testing.small_tokenizer import SmallTokenizer

SAMPLERS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("sampler")}


def softmax(logits: np.ndarray, temp: float) -> np.ndarray:
    if temp == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    weights = np.exp((logits - logits.max()) / temp)
    return weights / weights.sum()


def descending(chances: np.ndarray) -> np.ndarray:
    """Ids from the most likely down, lower ids first among equals."""
    return np.argsort(-chances, kind="stable")


def among(chances: np.ndarray, ids: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(chances)
    kept[ids] = chances[ids]
    return kept / kept.sum()


class TestGreedy(SamplerSuite):
    spec = SAMPLERS["greedy"]
    bad_options = ({"temp": 0.8},)

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        return softmax(logits, 0)


class TestTemperature(SamplerSuite):
    spec = SAMPLERS["temperature"]
    option_sets = ({}, {"temp": 0}, {"temp": 3.0})
    bad_options = ({"temp": -0.1}, {"temp": "nan"}, {"temp": "inf"})

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        return softmax(logits, options.temp)


class TestTopK(SamplerSuite):
    spec = SAMPLERS["top-k"]
    option_sets = ({}, {"k": 3, "temp": 2.0}, {"k": 1}, {"k": 4, "temp": 0})
    bad_options = ({"k": 0}, {"k": -1}, {"k": 1.5}, {"temp": -1})

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        chances = softmax(logits, options.temp)
        return among(chances, descending(logits)[: options.k])


class TestTopP(SamplerSuite):
    spec = SAMPLERS["top-p"]
    option_sets = ({}, {"p": 0.45, "temp": 2.0}, {"p": 1, "temp": 1.0}, {"p": 1e-6}, {"p": 0.9, "temp": 0})
    bad_options = ({"p": 0}, {"p": 1.01}, {"p": -0.5}, {"temp": -1})

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        chances = softmax(logits, options.temp)
        order = descending(chances)
        reached = np.cumsum(chances[order]) >= options.p - 1e-12
        return among(chances, order[: int(np.argmax(reached)) + 1])


class TestMinP(SamplerSuite):
    spec = SAMPLERS["min-p"]
    option_sets = ({}, {"p": 0.3, "temp": 2.0}, {"p": 0}, {"p": 1}, {"p": 0.1, "temp": 0})
    bad_options = ({"p": -0.1}, {"p": 1.1}, {"temp": -1})

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        chances = softmax(logits, options.temp)
        return among(chances, np.flatnonzero(chances >= options.p * chances.max()))


class TestRepetitionPenalty(SamplerSuite):
    spec = SAMPLERS["repetition-penalty"]
    option_sets = ({}, {"penalty": 1}, {"penalty": 3.0, "window": 2}, {"penalty": 0.5})
    bad_options = ({"penalty": 0}, {"penalty": -1}, {"penalty": "nan"}, {"window": 0}, {"window": 1.5})

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        counted = tokens if options.window is None else tokens[-options.window :]
        changed = [
            x if i not in counted else x / options.penalty if x > 0 else x * options.penalty
            for i, x in enumerate(logits)
        ]
        return softmax(np.array(changed), 1.0)


class TestPresencePenalty(SamplerSuite):
    spec = SAMPLERS["presence-penalty"]
    option_sets = ({}, {"penalty": 0}, {"penalty": 3.0, "window": 2}, {"penalty": -1.5})
    bad_options = ({"penalty": "nan"}, {"penalty": "inf"}, {"window": 0}, {"window": 1.5})

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        return softmax(logits - options.penalty * (self.times(logits, tokens, options) > 0), 1.0)

    @staticmethod
    def times(logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        counted = tokens if options.window is None else tokens[-options.window :]
        return np.bincount(counted, minlength=len(logits))


class TestFrequencyPenalty(SamplerSuite):
    spec = SAMPLERS["frequency-penalty"]
    option_sets = TestPresencePenalty.option_sets
    bad_options = TestPresencePenalty.bad_options

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        return softmax(logits - options.penalty * TestPresencePenalty.times(logits, tokens, options), 1.0)


def test_every_sampler_is_covered() -> None:
    penalties = (TestRepetitionPenalty, TestPresencePenalty, TestFrequencyPenalty)
    suites = (TestGreedy, TestTemperature, TestTopK, TestTopP, TestMinP, *penalties)
    assert {suite.spec.name for suite in suites} == set(SAMPLERS)


# --- samplers with state, as a third party may write them ---------------------


def cooling(options: NoOptions) -> Transform:
    """Colder with each token of the text: its state is how many there were."""
    drawn = 0

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        nonlocal drawn
        drawn += 1
        return logits * (1 + 0.1 * drawn)

    return transform


def never_the_last(options: NoOptions) -> Transform:
    """The last id does not come again, where another one may."""

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        others = mx.arange(logits.shape[-1]) != tokens[-1]
        allowed = (mx.where(others, logits, -mx.inf) > -mx.inf).any(axis=-1, keepdims=True)
        return mx.where(others | ~allowed, logits, -mx.inf)

    return transform


class TestState(SamplerSuite):
    spec = Sampler(name="cooling", summary="s", build=cooling)

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        return softmax(logits, 1 / 1.1)


class TestWithoutProbabilities(SamplerSuite):
    spec = Sampler(name="never-the-last", summary="s", build=never_the_last)


# --- the suite fails what is broken -------------------------------------------

_SHARED: list[int] = []


def _remembers(logits: mx.array, tokens: Sequence[int]) -> mx.array:
    """State that outlives its text."""
    _SHARED.append(tokens[-1])
    return mx.where(mx.arange(logits.shape[-1]) == len(_SHARED) % logits.shape[-1], logits + 5, logits)


def _noisy(logits: mx.array, tokens: Sequence[int]) -> mx.array:
    return logits + mx.random.gumbel(logits.shape)


def _row_by_row(logits: mx.array, tokens: Sequence[int]) -> mx.array:
    """The whole batch by the first row's highest."""
    return mx.where(logits >= logits[:1].max() - 0.5, logits, mx.maximum(logits, -50) - 100)


def _across_rows(logits: mx.array, tokens: Sequence[int]) -> mx.array:
    """Each row by the most likely token of them all."""
    chances = mx.softmax(logits, axis=-1)
    return mx.where(chances >= 0.2 * chances.max() ** 2, logits, -mx.inf)


def _half(logits: mx.array, tokens: Sequence[int]) -> mx.array:
    """Half of what was allowed is always left out; what was forbidden is allowed."""
    return mx.where(logits == -mx.inf, 0.0, logits)


BROKEN: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "no logits": (lambda logits, tokens: None, "gives_logits", {}),
    "numpy": (lambda logits, tokens: np.array(logits), "gives_logits", {}),
    "ids": (lambda logits, tokens: mx.argmax(logits, axis=-1), "gives_logits", {}),
    "one row": (lambda logits, tokens: logits[0], "gives_logits", {}),
    "half precision": (lambda logits, tokens: logits.astype(mx.float16), "gives_logits", {}),
    "NaN": (lambda logits, tokens: logits * mx.nan, "gives_logits", {}),
    "infinity": (lambda logits, tokens: mx.where(logits > -mx.inf, mx.inf, logits), "gives_logits", {}),
    "no token": (lambda logits, tokens: mx.full(logits.shape, -mx.inf), "gives_logits", {}),
    "a forbidden token": (_half, "gives_logits", {"kind": "ruled out"}),
    "a key too": (lambda logits, tokens, key: logits, "gives_logits", {}),
    "logits alone": (lambda logits: logits, "gives_logits", {}),
    "one row by another": (_row_by_row, "every_row", {}),
    "every row by all": (_across_rows, "every_row", {}),
    "chance of its own": (_noisy, "nothing_is_random", {}),
    "chance of its own, in texts": (_noisy, "same_seed", {}),
    "state of all texts, by length": (_remembers, "same_seed", {}),
    "state of all texts, by turns": (_remembers, "texts_know_nothing", {}),
    "no temperature": (lambda logits, tokens: logits, "temperature_zero", {"kind": "spread"}),
    "another distribution": (lambda logits, tokens: logits * 1.2, "distribution", {}),
    "no check of ranges": (lambda logits, tokens: logits, "refuses", {"bad": {"temp": 2}}),
}


@dataclass(frozen=True)
class TempOptions:
    temp: float = option(1.0, help="temperature", minimum=0)


@pytest.mark.parametrize(("transform", "test", "arguments"), BROKEN.values(), ids=BROKEN)
def test_the_suite_fails_what_is_broken(transform: Any, test: str, arguments: dict[str, Any]) -> None:
    class Broken(SamplerSuite):
        spec = Sampler(name="broken", summary="s", options=TempOptions, build=lambda options: transform)

        def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
            return softmax(logits, 1.0)

    _SHARED.clear()
    (name,) = [name for name in vars(SamplerSuite) if name.startswith(f"test_{test}")]
    function = getattr(Broken(), name)
    given = {"values": {}, "kind": "spread", "history": "some tokens", **arguments}
    wanted = inspect.signature(function).parameters
    with pytest.raises((AssertionError, PluginError, TypeError, AttributeError, pytest.fail.Exception)):
        function(**{key: value for key, value in given.items() if key in wanted})


@pytest.mark.parametrize("test", sorted({test for _, test, _ in BROKEN.values()} - {"refuses"}))
def test_the_same_call_passes_what_is_sound(test: str) -> None:
    """What the test above catches are the faults, and not the way it calls."""
    (name,) = [name for name in vars(SamplerSuite) if name.startswith(f"test_{test}")]
    function = getattr(TestTemperature(), name)
    given = {"values": {"temp": 1.0}, "kind": "spread", "history": "some tokens"}
    wanted = inspect.signature(function).parameters
    function(**{key: value for key, value in given.items() if key in wanted})


# --- samplers that ask for the tokenizer --------------------------------------


def _vowels(options: Any, tokenizer: Any) -> Any:
    """Texts of vowels; anything where a text is to end."""
    texts = ["".join(tokenizer.stream([token])) for token in range(tokenizer.vocab_size)]
    good = mx.array([text in "aeiou" and bool(text) for text in texts])
    return lambda logits, tokens: mx.where(good, logits, -mx.inf)


class TestVowels(SamplerSuite):
    """One that lets few tokens come, so that others may have left it none."""

    spec = Sampler(name="vowels", summary="vowels alone", build=_vowels)

    def test_it_was_given_logits_over_the_vocabulary(self) -> None:
        assert len(self.text({}, 9)) == 9
        assert set(self.tokenizer.decode(self.text({}, 9))) <= set("aeiou")


def _nothing(options: Any, tokenizer: Any) -> Any:
    return lambda logits, tokens: mx.full(logits.shape, -mx.inf)


def _more(options: Any, tokenizer: Any) -> Any:
    return lambda logits, tokens: mx.zeros(logits.shape)


@pytest.mark.parametrize(
    ("build", "kind"), [(_nothing, "spread"), (_nothing, "one left"), (_more, "ruled out")]
)
def test_the_suite_fails_those_that_are_broken(build: Any, kind: str) -> None:
    class Broken(SamplerSuite):
        spec = Sampler(name="broken", summary="s", build=build)

    with pytest.raises(AssertionError):
        Broken().test_gives_logits_that_leave_a_token({}, kind, "some tokens")


def test_the_small_tokenizer_is_one() -> None:
    """Texts come back, streams are texts, an answer follows what asks for it."""
    small = SmallTokenizer()
    text = 'SELECT a FROM t;\n\n{"a": true}, the end\t~'
    ids = small.encode(text, eos=True)
    assert (ids[0], ids[-1]) == (small.bos, *small.stops) and all(0 <= i < small.vocab_size for i in ids)
    assert small.decode(ids) == text and len(ids) < len(text)
    assert list(small.stream(ids, 4)) != [text] and "".join(small.stream(ids, 4)) == text
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked, whole = ([i for piece in small.render(part) for i in piece.ids] for part in (talk[:1], talk))
    assert whole[: len(asked)] == asked and small.render(talk)[-1].answer
    with pytest.raises(DataError):
        small.encode("é")
