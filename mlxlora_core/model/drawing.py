"""``logits -> transforms -> a token``: how each token of a text is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.errors import DivergedError
from mlxlora_core.machine.device import runs_ahead
from mlxlora_core.plugins import Component, transform_of
from mlxlora_core.plugins.surroundings import kept
from mlxlora_core.values import Tokenizer


@dataclass(frozen=True)
class Drawn:
    """A token that the device may still be drawing.

    Attributes:
        token: its id, (1,).
        checks: the highest logit of the model, and the highest after all samplers.
        refuse: raises the error for logits whose highest is not finite.
    """

    token: mx.array
    checks: tuple[mx.array, mx.array]
    refuse: Callable[[], None]

    def read(self) -> int:
        """The id, after waiting for the device.

        Raises:
            MlxloraError: as :class:`Drawing`.
        """
        if not all(math.isfinite(_number(check)) for check in self.checks):
            self.refuse()
        return int(np.array(self.token)[0])


class Drawing:
    """Draws the tokens of one text; a token is a function of the seed, its position and the ids before it.

    Args:
        samplers: (component, its options) of each, in the order in which they change the logits.
            They are built here, for this text only.
        seed: from 0 to 2**32 - 1.
        tokenizer: of the model, for samplers that ask for it; None if none does.

    Raises:
        PluginError: a sampler does not build a function of logits and ids.
    """

    def __init__(
        self, samplers: Iterable[tuple[Component, Any]], seed: int, tokenizer: Tokenizer | None = None
    ) -> None:
        self._transforms = [
            (component, transform_of(component, options, tokenizer)) for component, options in samplers
        ]
        self._seed = seed
        # Checking the state of the process after each token would cost too much: once must do.
        self._harmless = {c.id for c, _ in self._transforms if c.plugin.origin == "built-in"}

    def __call__(self, logits: mx.array, tokens: Sequence[int]) -> int:
        """The id that follows the ids ``tokens``.

        Args:
            logits: (1, V), float32.
            tokens: all ids before it, including the prompt.

        Raises:
            DivergedError: the logits of the model are not finite.
            PluginError: a sampler does not return logits, or leaves no token to draw.
        """
        best = float(np.array(logits).max())
        if not math.isfinite(best):
            self._refuse(best, len(tokens) + 1, ())
        logits, highest = self._changed(logits, tokens)
        values = np.array(logits)
        if not np.isfinite(values.max()):
            self._refuse(best, len(tokens) + 1, highest)
        if np.count_nonzero(values > -math.inf) == 1:  # drawing among one costs up to 15 times as much
            return int(values.argmax())
        return int(mx.random.categorical(logits, key=self._key(len(tokens))))

    def soon(self, logits: mx.array, tokens: Sequence[int]) -> int | Drawn:
        """As a call, but on a GPU without waiting for the token; its errors are raised when it is read."""
        if not runs_ahead():
            return self(logits, tokens)
        best, place = logits.max(), len(tokens) + 1
        logits, highest = self._changed(logits, tokens)

        def refuse() -> None:
            self._refuse(_number(best), place, highest)

        token = mx.random.categorical(logits, key=self._key(len(tokens)))
        return Drawn(token, (best, logits.max()), refuse)

    def _key(self, place: int) -> mx.array:
        """The random key for the token that follows ``place`` others."""
        return mx.random.key((self._seed << 32) + place)

    def _changed(self, logits: mx.array, tokens: Sequence[int]) -> tuple[mx.array, list[mx.array]]:
        """The logits after all samplers, and the highest one after each."""
        history, highest = tuple(tokens), []
        for component, transform in self._transforms:
            with kept(f"sampler {component.id}", look=component.id not in self._harmless) as watch:
                changed = transform(logits, history)
            logits = _like(component, changed, logits)
            highest.append(logits.max())  # computed only if there is a fault to find
            if not watch.changed:
                self._harmless.add(component.id)
        return logits, highest

    def _refuse(self, best: float, place: int, highest: Sequence[mx.array]) -> None:
        """Raise the error for the model if its highest logit is not finite, otherwise for a sampler."""
        if not math.isfinite(best):
            raise DivergedError(
                f"the logits of the model at token {place} are not finite",
                fix="check the weights of the model and of the adapter for NaN, Inf and values out of range",
            )
        self._blame([_number(value) for value in highest])

    def _blame(self, highest: Sequence[float]) -> None:
        """Raise the error for the first sampler whose highest logit is not finite."""
        for (component, _), value in zip(self._transforms, highest, strict=True):
            if not math.isfinite(value):
                got = "no token that may come (all logits are -inf)" if value == -math.inf else str(value)
                raise component.breach("transform", got, "numbers, or -inf where a token may not come")


def _like(component: Component, logits: Any, before: mx.array) -> mx.array:
    """``logits``, if a transform returned them in the shape and type of ``before``."""
    checked = component.checked("transform", logits, mx.array)
    if (checked.shape, checked.dtype) != (before.shape, before.dtype):
        raise component.breach("transform", _described(checked), _described(before))
    return checked


def _number(x: mx.array) -> float:
    return float(np.array(x))


def _described(x: mx.array) -> str:
    return f"{str(x.dtype).removeprefix('mlx.core.')} {x.shape}"
