"""Samplers ``greedy``, ``temperature``, ``top-k``, ``top-p`` and ``min-p``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlxlora_core.api import NoOptions, Sample, Sampler, hookimpl, option


@dataclass(frozen=True)
class TemperatureOptions:
    """How much chance there is."""

    temp: float = option(0.8, help="divides the logits; 0 is the most likely token", minimum=0)


@dataclass(frozen=True)
class TopKOptions(TemperatureOptions):
    """How many tokens take part."""

    k: int = option(40, help="the most likely tokens that take part", unit="tokens", minimum=1)


@dataclass(frozen=True)
class TopPOptions(TemperatureOptions):
    """How much probability takes part."""

    p: float = option(
        0.9, help="probability that the most likely tokens must reach together", above=0, maximum=1
    )


@dataclass(frozen=True)
class MinPOptions(TemperatureOptions):
    """How likely a token must be to take part."""

    p: float = option(0.05, help="share of the highest probability that a token needs", minimum=0, maximum=1)


def greedy(options: NoOptions) -> Sample:
    """See :func:`mlxlora_samplers.sampling.greedy`."""
    from mlxlora_samplers import sampling

    return sampling.greedy


def temperature(options: TemperatureOptions) -> Sample:
    """See :func:`mlxlora_samplers.sampling.temperature`."""
    from mlxlora_samplers import sampling

    return sampling.temperature(options.temp)


def top_k(options: TopKOptions) -> Sample:
    """See :func:`mlxlora_samplers.sampling.top_k`."""
    from mlxlora_samplers import sampling

    return sampling.top_k(options.temp, options.k)


def top_p(options: TopPOptions) -> Sample:
    """See :func:`mlxlora_samplers.sampling.top_p`."""
    from mlxlora_samplers import sampling

    return sampling.top_p(options.temp, options.p)


def min_p(options: MinPOptions) -> Sample:
    """See :func:`mlxlora_samplers.sampling.min_p`."""
    from mlxlora_samplers import sampling

    return sampling.min_p(options.temp, options.p)


@hookimpl
def mlxlora_samplers() -> Iterable[Sampler]:
    """The five samplers of this plugin."""
    return [
        Sampler(name="greedy", summary="the most likely token", build=greedy),
        Sampler(
            name="temperature",
            summary="any token, by its probability at a temperature",
            options=TemperatureOptions,
            build=temperature,
        ),
        Sampler(name="top-k", summary="one of the k most likely tokens", options=TopKOptions, build=top_k),
        Sampler(
            name="top-p",
            summary="one of the likely tokens that reach a probability together",
            options=TopPOptions,
            build=top_p,
        ),
        Sampler(
            name="min-p",
            summary="one of the tokens not much less likely than the most likely",
            options=MinPOptions,
            build=min_p,
        ),
    ]
