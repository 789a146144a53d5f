"""Ways to run a model, for the suite of architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import parameters
from mlxlora_core.values import Cache


class OnlyForward(nn.Module):
    """A linear's forward and nothing else."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        self._linear = [linear]  # in a list: no child module, no parameters
        self.called = False

    def __call__(self, x: mx.array, *indices: mx.array) -> mx.array:
        """What the linear gives; a stacked one is told which linear each row takes."""
        self.called = True
        out: mx.array = self._linear[0](x, *indices)
        return out


def in_parts(model: LanguageModel, ids: mx.array, lengths: list[int]) -> mx.array:
    """Logits of ``ids`` given to a cached model in parts of these lengths."""
    cache: list[Cache] = model.make_cache()
    parts, start = [], 0
    for length in lengths:
        parts.append(model(ids[:, start : start + length], cache=cache))
        start += length
        assert [entry.offset for entry in cache] == [start] * len(cache)
    return mx.concatenate(parts, axis=1)


def loss_of(model: LanguageModel, ids: mx.array) -> mx.array:
    """Mean nats of each token after the first."""
    logits = model(ids)[:, :-1]
    return nn.losses.cross_entropy(logits, ids[:, 1:], reduction="mean")


def gradients_of(model: LanguageModel, ids: mx.array) -> dict[str, mx.array]:
    """The gradient of every parameter by its path."""
    return gradients_of_loss(model, lambda: loss_of(model, ids))


def gradients_of_loss(model: LanguageModel, loss: Callable[[], mx.array]) -> dict[str, mx.array]:
    """The gradient of every parameter by its path, of a loss that the model gives."""

    def with_weights(values: Any) -> mx.array:
        model.update(values)
        return loss()

    weights = tree_unflatten(list(parameters(model).items()))
    found: dict[str, mx.array] = dict(tree_flatten(mx.grad(with_weights)(weights)))
    model.update(weights)
    return found
