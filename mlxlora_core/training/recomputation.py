"""Gradient checkpointing: a layer keeps only its input and is computed again in the backward pass.

Source: Chen et al. 2016, arXiv:1604.06174, section 4.1, with a layer for each segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.model.dropout import with_current_keys
from mlxlora_core.model.language_model import LanguageModel, takes
from mlxlora_core.model.linears import layers_by_path


def can_recompute(model: LanguageModel) -> bool:
    """Whether a model can run its layers one by one."""
    return takes(model, "first", "last")


def run_recomputed(model: LanguageModel, hidden: mx.array, first: int, more: dict[str, Any]) -> mx.array:
    """The output of the top layer, (B, T, D), with the same numbers and gradient as ``model.run``.

    Args:
        model: one that :func:`can_recompute`; in a compiled step it must not draw from ``mx.random``.
        hidden: the input of layer ``first``, (B, T, D).
        first: the lowest layer to run.
        more: further arguments of ``model.run``.
    """
    module: Any = model
    layer_of = layers_by_path(model)
    trained: dict[str, mx.array] = dict(tree_flatten(module.trainable_parameters()))

    def layer_function(layer: int, names: list[str]) -> Callable[..., mx.array]:
        """A layer as a function of its input and of the parameters that train in it."""

        def run(hidden: mx.array, *tensors: mx.array) -> mx.array:
            module.update(tree_unflatten(list(zip(names, tensors, strict=True))))
            try:
                return model.run(hidden, first=layer, last=layer + 1, **more)
            finally:
                module.update(tree_unflatten([(name, trained[name]) for name in names]))

        return run

    for layer in range(first, len(model.layers)):
        names = [name for name in trained if layer_of(name) in (layer, None)]  # None: any layer may use it
        hidden = _recomputed(with_current_keys(layer_function(layer, names)))(
            hidden, *(trained[name] for name in names)
        )
    return hidden


def _recomputed(compute: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """``compute``, with a gradient that keeps only its arguments and draws the same random numbers again.

    ``mx.checkpoint`` draws other numbers, and may start before the gradient from above has arrived.
    """
    state: Any = mx.random.state
    before = state[0]
    function: Any = mx.custom_function(compute)

    def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        several = isinstance(primals, list | tuple)
        first, now = _number(before), _number(state[0])
        if first is not None:
            mx.random.seed(first)
        waiting = mx.depends(list(primals) if several else [primals], [cotangents])
        _, gradients = mx.vjp(compute, waiting, [cotangents])
        if now is not None:
            mx.random.seed(now)
        # MLX computes last what nothing waits for, and would hold what these gradients of all layers need.
        down = mx.depends(gradients[0], gradients[1:]) if gradients[1:] else gradients[0]
        return [down, *gradients[1:]] if several else down

    function.vjp(vjp)
    return function  # type: ignore[no-any-return]  # MLX's functions are not annotated


def _number(key: mx.array) -> int | None:
    """The seed that makes a key; None inside a function that is being compiled."""
    try:
        words = np.array(key)
    except (RuntimeError, ValueError):
        return None
    return int(words[0]) << 32 | int(words[1])
