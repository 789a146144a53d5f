"""``rows -> batches -> (nats, tokens) -> update``: an iterator over steps.

The caller prints, saves and stops. Between two steps the state is consistent, and consists of
:attr:`Training.progress`, the trainable parameters and the tensors of the optimizer. Random
numbers in a step are a function of (seed, step) alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.distributed.watch import Watch
from mlxlora_core.errors import DivergedError, ModelError, UsageError
from mlxlora_core.files.tensor_checks import mismatches
from mlxlora_core.machine.device import product_precision, runs_ahead
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.training.batches import Collator, steps_from
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.events import Advanced, Note, Report, SpikeReport, TrainReport, ValidReport
from mlxlora_core.training.examples import Example
from mlxlora_core.training.message import Total, require_same
from mlxlora_core.training.optimizer import learning_rate
from mlxlora_core.training.optimizer import make as make_optimizer
from mlxlora_core.training.prefix import Prefix
from mlxlora_core.training.progress import SPIKE_STEPS, Progress, Window, finite_or_none
from mlxlora_core.training.settings import TrainConfig
from mlxlora_core.training.shapes import shapes_of
from mlxlora_core.training.update import (
    Update,
    Updates,
    diverged,
    is_clipped,
    is_compiled,
    is_packed,
    of_rank,
)

SPIKE_FACTOR = 10  # a loss so many times the median of the last ones is reported


@dataclass(frozen=True)
class _Pending:
    """A step that the device is still computing, and its learning rate."""

    step: int
    rate: float
    update: Update


class Training:
    """A training, step by step: iterating makes steps and yields the reports that are due after each.

    It validates before the first step, every ``steps_per_eval`` steps and after the last one, always
    on the same rows. If there are rows to validate on, the first item yielded by a new training is
    its first validation.

    Args:
        model: updated in place.
        train_set: rows to train on; the last step of an epoch may have fewer rows than the others.
        valid_set: rows to validate on; empty for no validation.
        config: how to train.
        seed: for the order of rows and for dropout.
        factors: parameter -> factor on its learning rate; 1 for all that are not named.
        prefix: the kept hidden states of the rows, if there are any.
        recompute: whether layers keep only their input for the backward pass.
        group: the ranks that train together; each iterates in step with the others and yields the
            same reports.

    On a GPU the loss of a step is read while the device computes the next one, unless a report or
    a validation is due. State and :attr:`progress` are still those of the last step, but a spike is
    reported one step late.

    Attributes:
        compiled: whether the step is compiled.
        packed: whether the rows of a batch are packed, not padded.
        validation_bytes: the memory that a validation may take; None is what is free.
        prefix: as given.
        recompute: as given.
        group: as given.
        signum: returns the signal that this process has received, or None; see :attr:`stopped_by`.
        watch: is told what this process is doing.

    Raises:
        UsageError: patience without rows to validate on, or packing with a model that cannot pack.
        DivergedError: while iterating: a loss or a gradient is not finite; the update was not made
            and the state is that before the step.
        RankError: while iterating: the ranks hold different parameters.
    """

    def __init__(
        self,
        model: LanguageModel,
        train_set: Sequence[Example],
        valid_set: Sequence[Example],
        config: TrainConfig,
        seed: int,
        factors: Mapping[str, float] = MappingProxyType({}),
        prefix: Prefix | None = None,
        recompute: bool = False,
        group: Group = ALONE,
    ) -> None:
        if config.patience is not None and not valid_set:
            raise UsageError("patience needs rows to validate on", fix="leave it out, or add valid.jsonl")
        self.config, self.seed = config, seed
        self.validation_bytes: int | None = None
        self._model, self._train_set, self._valid_set = model, train_set, valid_set
        self.prefix, self.recompute, self.group = prefix, recompute, group
        self.signum: Callable[[], int | None] = lambda: None
        self.watch = Watch()
        self._heard: int | None = None  # a signal that any rank has received
        self._stopped_by: int | None = None
        self._collate, self._collate_valid = (
            prefix.collator(split) if prefix and rows else Collator(rows)
            for split, rows in (("train", train_set), ("valid", valid_set))
        )
        module: Any = model
        self._module = module
        self._optimizer = make_optimizer(config, model, factors)
        self._optimizer.init(self._module.trainable_parameters())
        self._ahead = runs_ahead()
        self.arrange(is_compiled(config), is_packed(model, config))
        self._progress = Progress()
        self._pending: _Pending | None = None
        self._spikes: tuple[SpikeReport, ...] = ()
        self._seconds, self._last = 0.0, (math.nan, math.nan)

    def arrange(self, compiled: bool, packed: bool) -> None:
        """Choose for all further steps whether they are compiled, and whether rows are packed or padded."""
        config, self.compiled, self.packed = self.config, compiled, packed
        few = compiled and not packed  # nearly every packed batch has a shape of its own
        shapes = shapes_of(self._train_set, of_rank(config, self.group).batch_size) if few else None
        self._collate = replace(self._collate, packing=packed, shapes=shapes)
        self._collate_valid = replace(self._collate_valid, packing=packed)
        self._updates = Updates(
            self._model, self._collate, self._optimizer, config, compiled, self.recompute, self.group
        )

    @property
    def progress(self) -> Progress:
        """The progress so far, after waiting for the step that the device is computing."""
        self._spikes = self.settle()
        return self._progress

    @property
    def step(self) -> int:
        """The number of steps made, without waiting for the device."""
        return self._progress.step + (self._pending is not None)

    @property
    def best_step(self) -> int | None:
        """The step of the best validation so far, without waiting for the device."""
        return self._progress.best_step

    @property
    def compiles(self) -> int:
        """How many times a part of the step was compiled."""
        return self._updates.compiles

    @property
    def finished(self) -> bool:
        """Whether no step is left, or patience has run out."""
        return self.step >= self.config.iters or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether patience has run out."""
        return self.config.patience is not None and self._progress.worse >= self.config.patience

    @property
    def stopped_by(self) -> int | None:
        """The signal after which no step follows, or None; all ranks have it after the same step."""
        return self.signum() if self.group.size == 1 else self._stopped_by

    def optimizer_tensors(self) -> dict[str, mx.array]:
        """The state of the optimizer, by name."""
        return dict(tree_flatten(self._optimizer.state))

    def restore(self, progress: Progress, optimizer: Mapping[str, mx.array]) -> None:
        """Continue from a saved state; the caller restores the trainable parameters.

        Raises:
            ModelError: the tensors do not fit this optimizer.
        """
        faults = mismatches(optimizer, self.optimizer_tensors())
        if faults:
            raise ModelError("the state of the optimizer does not fit: " + "; ".join(faults))
        self._optimizer.state = tree_map_with_path(lambda name, _: optimizer[name], self._optimizer.state)
        self._optimizer.init(self._module.trainable_parameters())
        mx.eval(self._optimizer.state)
        self._progress, self._pending, self._spikes = progress, None, ()

    def prepare(self) -> Iterator[Advanced | Note]:
        """If steps are left, compute the hidden states to keep; yields progress, and what that saves.

        Raises:
            UsageError: they cannot be kept at all, or not in the type that was asked for.
        """
        prefix = self.prefix
        if prefix is None or self.finished:
            return
        self._module.eval()
        self.watch.phase("reading the rows that are kept")
        prefix.check_rows()
        if self.config.reuse_prefix == "on" and not prefix.reuse.on:
            raise UsageError(f"reuse_prefix cannot be on: {prefix.reuse.why_not}", fix="leave it at auto")
        yield Note(prefix.words)
        with product_precision(self.config.compute):
            for advanced in prefix.fill():
                self._hear()
                yield advanced
        yield from map(Note, self.notes())
        if prefix.reuse.on and prefix.reuse.stored != prefix.reuse.computed:
            yield Note(prefix.difference(self._collate(next(self._rows(0))[: self.config.batch_size])))

    def notes(self) -> list[str]:
        """New notes on the kept hidden states since the last call."""
        return self.prefix.notes() if self.prefix is not None else []

    def _hear(self) -> None:
        """Tell all ranks of a signal that one has received, while there are no steps that would."""
        if self.group.size > 1:
            self.watch.phase("reading the rows that are kept")
            given = self.group.share(bytes([self.signum() or 0]))
            self._stopped_by = next((number for (number,) in given if number), None)

    def _rows(self, cursor: int) -> Iterator[list[int]]:
        """The rows of each step after the first ``cursor`` ones."""
        rows_a_step, by_length = self.config.rows_a_step, self.config.group_by_length
        return steps_from(self._train_set, rows_a_step, self.seed, cursor, by_length)

    def __iter__(self) -> Iterator[tuple[Report, ...]]:
        rows = self._rows(self.step)
        try:
            if self._valid_set and self.step == 0:
                with product_precision(self.config.compute):
                    first = self._validate(0)
                loss = finite_or_none(first.loss)
                self._progress = replace(self._progress, first_loss=loss, valid_loss=loss)
                yield (first,)
            while not self.finished:
                with product_precision(self.config.compute):
                    reports = tuple(self._step(next(rows)))
                yield reports
        finally:
            self._module.eval()

    def _step(self, rows: list[int]) -> Iterator[Report]:
        """Make one step; yields its reports, and those that the step before has left."""
        started = time.perf_counter()
        step, config = self.step + 1, self.config
        self.watch.phase(f"step {step}")
        rate = learning_rate(config, step)
        self._module.train()
        mx.random.seed(self.seed * 2**32 + step)
        update = self._updates.make_update(rows, rate, self.signum())
        self._seconds += time.perf_counter() - started
        yield from self.settle()
        self._updates.take_update(update)
        self._pending = _Pending(step, rate, update)
        if not self._ahead:
            yield from self.settle()
        valid = None
        if self._valid_set and (step % config.steps_per_eval == 0 or step == config.iters):
            yield from self.settle()
            valid = self._validate(step)
            self._progress = self._progress.after_validation(valid.loss)
        if step % config.steps_per_report == 0 or self.finished:
            yield from self.settle()
            yield self._report()
        if valid is not None:
            yield valid
        # Not as soon as it is heard: a rank that saves settles its step earlier than the others.
        self._stopped_by = self._heard

    def settle(self) -> tuple[SpikeReport, ...]:
        """Wait for the step that the device is computing and count it; returns spikes not yet reported.

        Raises:
            DivergedError: the step was not finite; the state is that before it.
        """
        spikes, pending = self._spikes, self._pending
        self._spikes, self._pending = (), None
        if pending is None:
            return spikes
        started = time.perf_counter()
        sums = pending.update.sums
        loss, norm = sums.loss, float(pending.update.norm)
        mx.eval(self._module.trainable_parameters(), self._optimizer.state)
        if isinstance(sums, Total):
            require_same(sums.checksums, pending.step)
            self._heard = sums.signum
        self._seconds += time.perf_counter() - started
        sound, before = math.isfinite(loss.nats) and math.isfinite(norm), self._progress.recent
        if not sound and self.config.on_nonfinite == "stop":
            raise diverged(loss, pending.step, pending.update.rows, before)
        clipped = is_clipped(norm, self.config.grad_clip)
        self._progress = self._progress.after_step(loss, self._seconds, sound=sound, clipped=clipped)
        self._seconds, self._last = 0.0, (pending.rate, norm)
        if sound and len(before) == SPIKE_STEPS and loss.mean > SPIKE_FACTOR * statistics.median(before):
            spikes = (*spikes, SpikeReport(pending.step, loss.mean, statistics.median(before)))
        return spikes

    def _report(self) -> TrainReport:
        """The report on the steps since the last one."""
        window = self._progress.window
        loss = window.nats / window.tokens if window.tokens else math.nan
        self._progress = replace(self._progress, window=Window(), train_loss=finite_or_none(loss))
        return TrainReport(
            step=self._progress.step,
            loss=loss,
            learning_rate=self._last[0],
            grad_norm=self._last[1],
            steps_per_second=_rate(window.steps, window.seconds),
            tokens_per_second=_rate(window.tokens, window.seconds),
            trained_tokens=self._progress.trained_tokens,
            peak_memory_bytes=mx.get_peak_memory(),
            clipped=window.clipped,
            skipped=window.skipped,
            padding=window.padding / window.positions if window.positions else math.nan,
        )

    def _validate(self, step: int) -> ValidReport:
        started = time.perf_counter()
        self.watch.phase(f"validation after step {step}")
        try:
            loss = evaluate(
                self._model,
                self._valid_set,
                self.config.batch_size,
                self.config.val_batches,
                self.validation_bytes,
                self._collate_valid,
                self.group,
            )
        except DivergedError:  # the last update was sound: let the next step decide
            return ValidReport(step, math.nan, 0, time.perf_counter() - started)
        seconds = time.perf_counter() - started
        return ValidReport(step, loss.mean, loss.tokens, seconds, loss.padding / loss.positions)


def train(
    model: LanguageModel,
    train_set: Sequence[Example],
    valid_set: Sequence[Example],
    config: TrainConfig,
    seed: int,
) -> Iterator[Report]:
    """The reports of a whole :class:`Training`, for callers that save nothing."""
    for reports in Training(model, train_set, valid_set, config, seed):
        yield from reports


def _rate(count: int, seconds: float) -> float:
    """``count`` per second; NaN if the clock stood still or went back."""
    return count / seconds if seconds > 0 else math.nan
