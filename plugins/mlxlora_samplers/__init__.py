"""Samplers ``greedy``, ``temperature``, ``top-k``, ``top-p``, ``min-p`` and three penalties."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlxlora_core.api import NoOptions, Sampler, Transform, hookimpl, option


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


@dataclass(frozen=True)
class WindowOptions:
    """Which tokens have come before."""

    window: int | None = option(
        None, help="only the last so many tokens count; none is all", unit="tokens", minimum=1
    )


@dataclass(frozen=True)
class RepetitionPenaltyOptions(WindowOptions):
    """How much less likely a token becomes that has come before."""

    penalty: float = option(1.2, help="divides the logits of tokens that came before", above=0)


@dataclass(frozen=True)
class PresencePenaltyOptions(WindowOptions):
    """How much is taken from the logit of a token that has come before."""

    penalty: float = option(0.5, help="taken from the logits of tokens that came before")


@dataclass(frozen=True)
class FrequencyPenaltyOptions(WindowOptions):
    """How much is taken from the logit of a token for each time that it has come before."""

    penalty: float = option(0.5, help="taken from the logits of tokens for each time that they came before")


def greedy(options: NoOptions) -> Transform:
    """See :func:`mlxlora_samplers.sampling.greedy`."""
    from mlxlora_samplers import sampling

    return sampling.greedy


def temperature(options: TemperatureOptions) -> Transform:
    """See :func:`mlxlora_samplers.sampling.temperature`."""
    from mlxlora_samplers import sampling

    return sampling.temperature(options.temp)


def top_k(options: TopKOptions) -> Transform:
    """See :func:`mlxlora_samplers.sampling.top_k`."""
    from mlxlora_samplers import sampling

    return sampling.top_k(options.temp, options.k)


def top_p(options: TopPOptions) -> Transform:
    """See :func:`mlxlora_samplers.sampling.top_p`."""
    from mlxlora_samplers import sampling

    return sampling.top_p(options.temp, options.p)


def min_p(options: MinPOptions) -> Transform:
    """See :func:`mlxlora_samplers.sampling.min_p`."""
    from mlxlora_samplers import sampling

    return sampling.min_p(options.temp, options.p)


def repetition_penalty(options: RepetitionPenaltyOptions) -> Transform:
    """See :func:`mlxlora_samplers.sampling.repetition_penalty`."""
    from mlxlora_samplers import sampling

    return sampling.repetition_penalty(options.penalty, options.window)


def presence_penalty(options: PresencePenaltyOptions) -> Transform:
    """See :func:`mlxlora_samplers.sampling.presence_penalty`."""
    from mlxlora_samplers import sampling

    return sampling.presence_penalty(options.penalty, options.window)


def frequency_penalty(options: FrequencyPenaltyOptions) -> Transform:
    """See :func:`mlxlora_samplers.sampling.frequency_penalty`."""
    from mlxlora_samplers import sampling

    return sampling.frequency_penalty(options.penalty, options.window)


@hookimpl
def mlxlora_samplers() -> Iterable[Sampler]:
    """The eight samplers of this plugin."""
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
        Sampler(
            name="repetition-penalty",
            summary="tokens that came before, made less likely",
            options=RepetitionPenaltyOptions,
            build=repetition_penalty,
        ),
        Sampler(
            name="presence-penalty",
            summary="tokens that came before, their logits made smaller",
            options=PresencePenaltyOptions,
            build=presence_penalty,
        ),
        Sampler(
            name="frequency-penalty",
            summary="tokens that came before, their logits made smaller for each time",
            options=FrequencyPenaltyOptions,
            build=frequency_penalty,
        ),
    ]
