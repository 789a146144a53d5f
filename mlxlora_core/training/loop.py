"""``rows -> batches -> (nats, tokens) -> update``: an iterator over steps.

The caller prints, saves and stops; between two steps the training is in a
consistent state, which :attr:`Training.progress` and two sets of tensors tell
whole. Randomness in a step is a function of (seed, step) alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from mlxlora_core.errors import DivergedError, ModelError, UsageError, listing
from mlxlora_core.files.tensor_checks import mismatches
from mlxlora_core.machine.device import product_precision
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.training.batches import Collator, steps_from
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.events import Report, SpikeReport, TrainReport, ValidReport
from mlxlora_core.training.examples import Example
from mlxlora_core.training.gradient import clipped_to, mean_gradient
from mlxlora_core.training.loss import Loss
from mlxlora_core.training.optimizer import learning_rate
from mlxlora_core.training.optimizer import make as make_optimizer
from mlxlora_core.training.progress import SPIKE_STEPS, Progress, Window
from mlxlora_core.training.settings import TrainConfig

SPIKE_FACTOR = 10  # a loss that many times the median of the last ones is told


class Training:
    """A training, step by step: iterating makes steps and gives the reports due after each.

    Validates before the first step, every ``steps_per_eval`` steps and after
    the last one, always on the same rows. The first item of a training from
    the start is its first validation, where there is something to validate on.

    Args:
        model: updated in place.
        train_set: rows to train on; a step that finds fewer than a batch left
            in the epoch uses those.
        valid_set: rows to validate on; empty for no validation.
        config: how.
        seed: of the order of rows and of dropout.
        factors: parameter -> factor on its learning rate, of those that have one.

    Attributes:
        progress: where it stands; what a step has changed is in it when the
            step's reports are given.
        validation_bytes: of memory that a validation may take; None is what is free.

    Raises:
        UsageError: patience without rows to validate on.
        DivergedError: while iterating: a loss or a gradient is not finite; the
            update was not made and the state is that before the step.
    """

    def __init__(
        self,
        model: LanguageModel,
        train_set: Sequence[Example],
        valid_set: Sequence[Example],
        config: TrainConfig,
        seed: int,
        factors: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        if config.patience is not None and not valid_set:
            raise UsageError("patience needs rows to validate on", fix="leave it out, or add valid.jsonl")
        self.config, self.seed, self.progress = config, seed, Progress()
        self.validation_bytes: int | None = None
        self._model, self._train_set, self._valid_set = model, train_set, valid_set
        self._collate = Collator(train_set)
        module: Any = model
        self._module = module
        self._optimizer = make_optimizer(config, model, factors)
        self._optimizer.init(self._module.trainable_parameters())

    @property
    def finished(self) -> bool:
        """Whether no step is left, or patience is at its end."""
        return self.progress.step >= self.config.iters or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether patience is at its end."""
        return self.config.patience is not None and self.progress.worse >= self.config.patience

    def optimizer_tensors(self) -> dict[str, mx.array]:
        """The state of the optimizer, by name."""
        return dict(tree_flatten(self._optimizer.state))

    def restore(self, progress: Progress, optimizer: Mapping[str, mx.array]) -> None:
        """Go on from a state; the trainable parameters are the caller's to restore.

        Raises:
            ModelError: the tensors are not those of this optimizer.
        """
        faults = mismatches(optimizer, self.optimizer_tensors())
        if faults:
            raise ModelError("the state of the optimizer does not fit: " + "; ".join(faults))
        self._optimizer.state = tree_map_with_path(lambda name, _: optimizer[name], self._optimizer.state)
        self._optimizer.init(self._module.trainable_parameters())
        mx.eval(self._optimizer.state)
        self.progress = progress

    def __iter__(self) -> Iterator[tuple[Report, ...]]:
        rows = steps_from(self._train_set, self.config.rows_a_step, self.seed, self.progress.step)
        try:
            if self._valid_set and self.progress.step == 0:
                with product_precision(self.config.compute):
                    first = self._validate(0)
                if math.isfinite(first.loss):
                    self.progress = replace(self.progress, first_loss=first.loss)
                yield (first,)
            while not self.finished:
                with product_precision(self.config.compute):
                    reports = tuple(self._step(next(rows)))
                yield reports
        finally:
            self._module.eval()

    def _step(self, rows: list[int]) -> Iterator[Report]:
        """Make one step; its reports."""
        started = time.perf_counter()
        step, config = self.progress.step + 1, self.config
        self._module.train()
        mx.random.seed(self.seed * 2**32 + step)
        loss, norm, gradient = mean_gradient(self._model, self._collate, rows, config.batch_size)
        sound = math.isfinite(loss.nats) and math.isfinite(norm)
        if not sound and config.on_nonfinite == "stop":
            raise _diverged(loss, step, rows, self.progress.recent)
        rate = learning_rate(config, step)
        limit = config.grad_clip if config.grad_clip is not None else math.inf
        clipped = sound and norm > limit
        if clipped:
            gradient = clipped_to(gradient, norm, limit)
        if sound:
            self._optimizer.learning_rate = rate
            self._optimizer.update(self._module, gradient)
            mx.eval(self._module.trainable_parameters(), self._optimizer.state)
        before = self.progress.recent
        self._count(step, loss, sound, clipped, time.perf_counter() - started)
        if sound and len(before) == SPIKE_STEPS and loss.mean > SPIKE_FACTOR * statistics.median(before):
            yield SpikeReport(step, loss.mean, statistics.median(before))
        valid = None
        if self._valid_set and (step % config.steps_per_eval == 0 or step == config.iters):
            valid = self._validate(step)
            self._compare(valid)
        if step % config.steps_per_report == 0 or self.finished:
            yield self._report(rate, norm)
        if valid is not None:
            yield valid

    def _count(self, step: int, loss: Loss, sound: bool, clipped: bool, seconds: float) -> None:
        """Note one step."""
        old, window = self.progress, self.progress.window
        if sound:
            window = replace(window, nats=window.nats + loss.nats, tokens=window.tokens + loss.tokens)
        window = replace(
            window,
            steps=window.steps + 1,
            seconds=window.seconds + seconds,
            clipped=window.clipped + clipped,
            skipped=window.skipped + (not sound),
        )
        self.progress = replace(
            old,
            step=step,
            trained_tokens=old.trained_tokens + (loss.tokens if sound else 0),
            skipped=old.skipped + (not sound),
            recent=(*old.recent, loss.mean)[-SPIKE_STEPS:] if sound else old.recent,
            window=window,
        )

    def _report(self, rate: float, norm: float) -> TrainReport:
        """The steps since the last report; counting starts again."""
        window = self.progress.window
        self.progress = replace(self.progress, window=Window())
        return TrainReport(
            step=self.progress.step,
            loss=window.nats / window.tokens if window.tokens else math.nan,
            learning_rate=rate,
            grad_norm=norm,
            steps_per_second=_rate(window.steps, window.seconds),
            tokens_per_second=_rate(window.tokens, window.seconds),
            trained_tokens=self.progress.trained_tokens,
            peak_memory_bytes=mx.get_peak_memory(),
            clipped=window.clipped,
            skipped=window.skipped,
        )

    def _validate(self, step: int) -> ValidReport:
        started = time.perf_counter()
        try:
            loss = evaluate(
                self._model,
                self._valid_set,
                self.config.batch_size,
                self.config.val_batches,
                self.validation_bytes,
            )
        except DivergedError:  # the update before it was sound, so that the next step has the last word
            return ValidReport(step, math.nan, 0, time.perf_counter() - started)
        return ValidReport(step, loss.mean, loss.tokens, time.perf_counter() - started)

    def _compare(self, valid: ValidReport) -> None:
        """Note whether a validation is the best; NaN never is."""
        best = self.progress.best_loss
        if math.isfinite(valid.loss) and (best is None or valid.loss < best):
            self.progress = replace(self.progress, best_loss=valid.loss, best_step=valid.step, worse=0)
        else:
            self.progress = replace(self.progress, worse=self.progress.worse + 1)


def train(
    model: LanguageModel,
    train_set: Sequence[Example],
    valid_set: Sequence[Example],
    config: TrainConfig,
    seed: int,
) -> Iterator[Report]:
    """The reports of a :class:`Training` from its start to its end, which nobody wants to save."""
    for reports in Training(model, train_set, valid_set, config, seed):
        yield from reports


def _rate(count: int, seconds: float) -> float:
    """How many a second; NaN where the clock stood still or went back."""
    return count / seconds if seconds > 0 else math.nan


def _diverged(loss: Loss, step: int, rows: Sequence[int], recent: Sequence[float]) -> DivergedError:
    what = "gradient" if math.isfinite(loss.nats) else "loss"
    last = f"{recent[-1]:.4g}" if recent else "none"
    return DivergedError(
        f"the {what} of step {step} is not finite (rows {listing(rows)}; last finite loss {last}); "
        "the update was not made",
        fix="lower --learning-rate, set --grad-clip 1, or go on without such steps: --on-nonfinite skip",
    )
