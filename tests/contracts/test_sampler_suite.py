"""The conformance suite over every sampler that is registered."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxlora_core import registry
from mlxlora_core.testing.sampler import SamplerSuite

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

    def probabilities(self, logits: np.ndarray, options: Any) -> np.ndarray:
        return softmax(logits, 0)


class TestTemperature(SamplerSuite):
    spec = SAMPLERS["temperature"]
    option_sets = ({}, {"temp": 0}, {"temp": 3.0})
    bad_options = ({"temp": -0.1}, {"temp": "nan"}, {"temp": "inf"})

    def probabilities(self, logits: np.ndarray, options: Any) -> np.ndarray:
        return softmax(logits, options.temp)


class TestTopK(SamplerSuite):
    spec = SAMPLERS["top-k"]
    option_sets = ({}, {"k": 3, "temp": 2.0}, {"k": 1}, {"k": 4, "temp": 0})
    bad_options = ({"k": 0}, {"k": -1}, {"k": 1.5}, {"temp": -1})

    def probabilities(self, logits: np.ndarray, options: Any) -> np.ndarray:
        chances = softmax(logits, options.temp)
        return among(chances, descending(logits)[: options.k])


class TestTopP(SamplerSuite):
    spec = SAMPLERS["top-p"]
    option_sets = ({}, {"p": 0.45, "temp": 2.0}, {"p": 1, "temp": 1.0}, {"p": 1e-6}, {"p": 0.9, "temp": 0})
    bad_options = ({"p": 0}, {"p": 1.01}, {"p": -0.5}, {"temp": -1})

    def probabilities(self, logits: np.ndarray, options: Any) -> np.ndarray:
        chances = softmax(logits, options.temp)
        order = descending(chances)
        reached = np.cumsum(chances[order]) >= options.p - 1e-12
        return among(chances, order[: int(np.argmax(reached)) + 1])


class TestMinP(SamplerSuite):
    spec = SAMPLERS["min-p"]
    option_sets = ({}, {"p": 0.3, "temp": 2.0}, {"p": 0}, {"p": 1}, {"p": 0.1, "temp": 0})
    bad_options = ({"p": -0.1}, {"p": 1.1}, {"temp": -1})

    def probabilities(self, logits: np.ndarray, options: Any) -> np.ndarray:
        chances = softmax(logits, options.temp)
        return among(chances, np.flatnonzero(chances >= options.p * chances.max()))


def test_every_sampler_is_covered() -> None:
    suites = (TestGreedy, TestTemperature, TestTopK, TestTopP, TestMinP)
    assert {suite.spec.name for suite in suites} == set(SAMPLERS)
