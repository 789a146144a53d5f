"""``logits -> transforms -> a token``: how each token of a text is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.errors import DivergedError
from mlxlora_core.plugins import Component, check_call
from mlxlora_core.plugins.surroundings import kept


class Drawing:
    """Draws the tokens of one text; a token is a function of the seed, its position and the ids before it.

    Args:
        samplers: (component, its options) of each, in the order in which they
            change the logits. They are built here, for this text alone.
        seed: from 0 to 2**32 - 1.

    Raises:
        PluginError: a sampler builds no function of logits and ids.
    """

    def __init__(self, samplers: Iterable[tuple[Component, Any]], seed: int) -> None:
        self._transforms = [
            (component, check_call(component, "build", component.spec.build(options), "logits", "tokens"))
            for component, options in samplers
        ]
        self._seed = seed
        # Looking around after each token would cost too much; once must do.
        self._harmless = {c.id for c, _ in self._transforms if c.plugin.origin == "built-in"}

    def __call__(self, logits: mx.array, tokens: Sequence[int]) -> int:
        """The id that follows the ids ``tokens``.

        Args:
            logits: (1, V), float32.
            tokens: all ids before it, the prompt's included.

        Raises:
            DivergedError: the logits of the model are not finite.
            PluginError: a sampler does not give logits, or none that leave a token.
        """
        if not np.isfinite(np.array(logits).max()):
            raise DivergedError(
                f"the logits of the model at token {len(tokens) + 1} are not finite",
                fix="check the weights of the model and of the adapter for NaN, Inf and values out of range",
            )
        history = tuple(tokens)
        highest = []
        for component, transform in self._transforms:
            with kept(f"sampler {component.id}", look=component.id not in self._harmless) as watch:
                changed = transform(logits, history)
            logits = _changed(component, changed, logits)
            highest.append(logits.max())  # computed only where there is a fault to find
            if not watch.changed:
                self._harmless.add(component.id)
        values = np.array(logits)
        if not np.isfinite(values.max()):
            self._blame([float(value) for value in highest])
        if np.count_nonzero(values > -math.inf) == 1:  # drawing among one costs up to 15 times as much
            return int(values.argmax())
        key = mx.random.key((self._seed << 32) + len(history))
        return int(mx.random.categorical(logits, key=key))

    def _blame(self, highest: Sequence[float]) -> None:
        """Raise the error of the first sampler whose highest logit is no number."""
        for (component, _), value in zip(self._transforms, highest, strict=True):
            if not math.isfinite(value):
                got = "no token that may come (all logits are -inf)" if value == -math.inf else str(value)
                raise component.breach("transform", got, "numbers, or -inf where a token may not come")


def _changed(component: Component, logits: Any, before: mx.array) -> mx.array:
    """``logits``, which a transform has made of ``before``: of the same shape and type."""
    checked = component.checked("transform", logits, mx.array)
    if (checked.shape, checked.dtype) != (before.shape, before.dtype):
        raise component.breach("transform", _described(checked), _described(before))
    return checked


def _described(x: mx.array) -> str:
    return f"{str(x.dtype).removeprefix('mlx.core.')} {x.shape}"
