"""What is asked of an engine, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import MlxloraError, ResourceError
from mlxlora_core.model.generate import CONTEXT, LENGTH, STOP
from mlxlora_core.plugins import Component

#: what else may end a text: its caller, or its deadline
CANCELLED, TIMEOUT = "cancelled", "timeout"

#: of a text whose end is an error
ERROR = "error"

#: all that may end a text
FINISH_REASONS = (STOP, LENGTH, CONTEXT, CANCELLED, TIMEOUT, ERROR)


class QueueFull(ResourceError):
    """As many requests wait as may."""


class Stopping(ResourceError):
    """The engine takes no more requests."""


#: logits (1, V), the tokens drawn before, how many may still come -> logits (1, V), of which one is finite
Change = Callable[[mx.array, Sequence[int], int], mx.array]


@dataclass(frozen=True)
class Request:
    """A text to be continued.

    Attributes:
        prompt: ids, one at least.
        adapter: the adapter's name, or None for the base.
        samplers: (component, its options) of each, in the order in which they change the logits.
        seed: of the random keys, from 0 to 2**32 - 1.
        max_tokens: how many at most; None for as many as the context holds.
        stop: texts of which each ends the text, and does not come itself.
        logprobs: of how many most likely tokens the log-probability is told, beside that of each drawn
            one; None for none of them.
        deadline: seconds from its submission on after which it is given up; None for no limit.
        change: changes the logits before the samplers do; called in the engine's thread.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    samplers: Sequence[tuple[Component, Any]] = ()
    seed: int = 0
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    deadline: float | None = None
    change: Change | None = None


@dataclass(frozen=True)
class Token:
    """A token that was drawn.

    Attributes:
        id: of the token.
        logprob: its natural log-probability by the model, before samplers; None where nobody asked.
        top: (id, log-probability) of the most likely ones, from the most likely down.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: of the prompt.
        completion_tokens: that were drawn, without an end token.
        cached_tokens: of the prompt, that had been read for another request.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Delta:
    """A part of what a request gets.

    Attributes:
        text: what is added to the text; it may be nothing.
        tokens: that were drawn since the part before.
        finish: one of :data:`FINISH_REASONS` in the last part, None before.
        usage: in the last part.
        error: what went wrong, where ``finish`` is ``error``.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    usage: Usage | None = None
    error: MlxloraError | None = None
