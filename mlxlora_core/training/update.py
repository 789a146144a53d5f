"""``rows -> gradient -> update``, computed by the device while the host goes on.

The device also decides whether loss and gradient are finite; if they are not, the update leaves
all parameters and the state of the optimizer as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.errors import DivergedError, UsageError, listing
from mlxlora_core.machine.device import runs_ahead
from mlxlora_core.model.language_model import LanguageModel, takes
from mlxlora_core.training.batches import Collator
from mlxlora_core.training.dealing import deal
from mlxlora_core.training.gradient import Gradients, Sums, mean_of, norm_squared
from mlxlora_core.training.loss import Loss
from mlxlora_core.training.message import Total, add_up
from mlxlora_core.training.settings import TrainConfig


@dataclass(frozen=True)
class Update:
    """The result of a step, which the device may still be computing.

    Attributes:
        rows: of the step, over all ranks.
        sums: of their nats, without the gradient.
        norm: of the mean gradient, before clipping.
        parameters: those that train, after the step.
        state: of the optimizer, after the step.
    """

    rows: Sequence[int]
    sums: Sums | Total
    norm: mx.array
    parameters: Any
    state: Any


class Updates:
    """Makes the updates of a training; see :meth:`make_update` and :meth:`take_update`.

    Args:
        model: whose parameters train.
        collate: makes its batches.
        optimizer: one of MLX's, initialized with those parameters.
        config: how to train.
        compiled: whether the gradient of a batch and the update are compiled.
        recompute: whether layers keep only their input for the backward pass.
        group: the ranks that share the rows of an update.
    """

    def __init__(
        self,
        model: LanguageModel,
        collate: Collator,
        optimizer: Any,
        config: TrainConfig,
        compiled: bool,
        recompute: bool = False,
        group: Group = ALONE,
    ) -> None:
        module: Any = model
        self._group, self._collate = group, collate
        self._module, self._optimizer = module, optimizer
        self._limit, self._compiled, self._compiles = config.grad_clip, compiled, 0
        few = compiled and not collate.packing
        self._gradients = Gradients(model, collate, of_rank(config, group).batch_size, few, recompute)

    @property
    def compiles(self) -> int:
        """How many times a function was compiled."""
        return self._compiles + self._gradients.compiles

    def make_update(self, rows: Sequence[int], rate: float, signum: int | None = None) -> Update:
        """The update from some rows; model and optimizer stay as they are.

        Args:
            rows: of all ranks.
            rate: the learning rate.
            signum: a signal that this rank has received; the message to the other ranks carries it.
        """
        parameters, state = self._module.trainable_parameters(), self._optimizer.state
        own = self._gradients(self._own(rows))
        sums = own if self._group.size == 1 else add_up(self._group, own, parameters, signum)
        numbers = (sums.total, sums.tokens, mx.array(rate))
        try:
            made = self._update(parameters, _copied(state), sums.gradient, *numbers)
        finally:
            self._optimizer.state = state
        return Update(rows, replace(sums, gradient=None), *made)

    def take_update(self, update: Update) -> None:
        """Put an update into model and optimizer, and let the device start computing it."""
        self._module.update(update.parameters)
        self._optimizer.state = update.state
        mx.async_eval(update.parameters, update.state, update.norm, update.sums.total)

    def _own(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows of the step that this rank computes."""
        if self._group.size == 1:
            return rows
        lengths = [len(self._collate.examples[row].tokens) for row in rows]
        return deal(rows, lengths, self._group.size)[self._group.rank]

    @cached_property
    def _update(self) -> Any:
        """:meth:`_made`, compiled or as it is."""
        if not self._compiled:
            return self._made

        def traced(*arguments: Any) -> Any:
            self._compiles += 1
            return self._made(*arguments)

        return mx.compile(traced)

    def _made(
        self, parameters: Any, state: Any, gradient: Any, nats: mx.array, tokens: mx.array, rate: mx.array
    ) -> tuple[mx.array, Any, Any]:
        """The norm, and parameters and state after the update, or unchanged if anything is not finite."""
        mean = mean_of(gradient, tokens)
        norm = mx.sqrt(norm_squared(mean))
        if self._limit is not None:
            factor = mx.where(norm > self._limit, self._limit / norm, 1.0)
            mean = tree_map(lambda g: (g * factor).astype(g.dtype), mean)
        self._optimizer.state = _copied(state)
        self._optimizer.learning_rate = rate
        updated = self._optimizer.apply_gradients(mean, parameters)
        sound = mx.isfinite(nats) & mx.isfinite(norm)

        def kept(new: mx.array, old: mx.array) -> mx.array:
            return mx.where(sound, new, old)

        return norm, tree_map(kept, updated, parameters), tree_map(kept, self._optimizer.state, state)


def of_rank(config: TrainConfig, group: Group) -> TrainConfig:
    """The config of one rank, whose batches are no larger than its share of a step."""
    return replace(config, batch_size=min(config.batch_size, -(-config.rows_a_step // group.size)))


def is_compiled(config: TrainConfig) -> bool:
    """Whether a training compiles its step from the start."""
    return config.compile == "on" or (config.compile == "auto" and runs_ahead())


def is_packed(model: LanguageModel, config: TrainConfig) -> bool:
    """Whether a training packs its rows from the start; ``auto`` pads them for a compiled step.

    Raises:
        UsageError: packing is asked for, but the model cannot.
    """
    if config.packing == "auto":
        return not runs_ahead() and not is_compiled(config) and takes(model, "lengths")
    if config.packing == "on" and not takes(model, "lengths"):
        raise UsageError(
            "packing needs an architecture whose run takes the lengths of rows, and this one takes none",
            fix="leave --packing at auto: rows are padded then",
        )
    return config.packing == "on"


def _copied(tree: Any) -> Any:
    """The same arrays in new containers, since an optimizer changes its containers in place."""
    return tree_map(lambda leaf: leaf, tree)


def is_clipped(norm: float, limit: float | None) -> bool:
    """Whether a gradient of this norm is clipped."""
    return limit is not None and math.isfinite(norm) and norm > limit


def diverged(loss: Loss, step: int, rows: Sequence[int], recent: Sequence[float]) -> DivergedError:
    """The error for a step whose loss or gradient is not finite.

    Args:
        loss: of the step.
        step: its number.
        rows: of the step.
        recent: losses of the steps before it.
    """
    what = "gradient" if math.isfinite(loss.nats) else "loss"
    last = f"{recent[-1]:.4g}" if recent else "none"
    return DivergedError(
        f"the {what} of step {step} is not finite (rows {listing(rows)}; last finite loss {last}); "
        "the update was not made",
        fix="lower --learning-rate, set --grad-clip 1, or go on without such steps: --on-nonfinite skip",
    )
