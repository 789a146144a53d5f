"""``rows -> batches -> (nats, tokens) -> update``: an iterator of reports.

The caller prints, saves and stops; between two reports the model is always in
a consistent state. Randomness in a step is a function of (seed, step) alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map

from mlxlora_core.data import Batch, Example, make_batch, steps_from
from mlxlora_core.errors import DivergedError, some
from mlxlora_core.evaluate import evaluate
from mlxlora_core.loss import Loss, nats
from mlxlora_core.specs import LanguageModel
from mlxlora_core.train_config import TrainConfig


@dataclass(frozen=True)
class TrainReport:
    """The steps since the last report.

    Attributes:
        step: updates made so far.
        loss: nats per counted token over these steps.
        learning_rate: of the last step.
        grad_norm: of the last step, before clipping.
        steps_per_second: only the time of training steps counts.
        tokens_per_second: counted tokens.
        trained_tokens: counted tokens since the start.
        peak_memory_bytes: most that MLX has held.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    steps_per_second: float
    tokens_per_second: float
    trained_tokens: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class ValidReport:
    """A validation.

    Attributes:
        step: updates made before it.
        loss: nats per counted token.
        tokens: how many counted.
        seconds: how long it took.
    """

    step: int
    loss: float
    tokens: int
    seconds: float


def train(
    model: LanguageModel,
    train_set: Sequence[Example],
    valid_set: Sequence[Example],
    config: TrainConfig,
    seed: int,
) -> Iterator[TrainReport | ValidReport]:
    """Train the trainable parameters of ``model``, reporting as it goes.

    Validates before the first step, every ``steps_per_eval`` steps and after
    the last one, always on the same rows.

    Args:
        model: updated in place.
        train_set: rows to train on; a step that finds fewer than a batch left
            in the epoch uses those.
        valid_set: rows to validate on; empty for no validation.
        config: how.
        seed: of the order of rows and of dropout.

    Raises:
        DivergedError: a loss or a gradient is not finite; the update was not made.
    """
    module: Any = model
    optimizer = _optimizer(config)
    optimizer.init(module.trainable_parameters())
    rows = steps_from(train_set, config.rows_a_step, seed)
    meter = _Meter()
    try:
        if valid_set:
            yield _validate(model, valid_set, config, 0)
        for step in range(1, config.iters + 1):
            started = time.perf_counter()
            module.train()
            mx.random.seed(seed * 2**32 + step)
            chosen = next(rows)
            loss, norm, gradient = _gradient(model, train_set, chosen, config.batch_size)
            _check_finite(loss, norm, step, chosen, meter.last_loss)
            rate = learning_rate(config, step)
            _update(module, optimizer, gradient, norm, rate, config)
            meter.add(loss, time.perf_counter() - started)
            if step % config.steps_per_report == 0 or step == config.iters:
                yield meter.report(step, rate, norm)
            if valid_set and (step % config.steps_per_eval == 0 or step == config.iters):
                yield _validate(model, valid_set, config, step)
    finally:
        module.eval()


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the update ``step``, counted from 1.

    Linear over the warm-up, up to the peak at its last step; then constant, or a
    half cosine that would reach ``min_learning_rate`` one step after the last
    (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5), so that every step moves.
    """
    if step < config.warmup:
        return config.learning_rate * step / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    peak = max(config.warmup, 1)
    done = (step - peak) / (config.iters + 1 - peak)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(config: TrainConfig) -> Any:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1) or AdamW (arXiv:1711.05101, algorithm 2)."""
    if config.optimizer == "adamw":
        return optimizers.AdamW(
            learning_rate=config.learning_rate, weight_decay=config.weight_decay, bias_correction=True
        )
    return optimizers.Adam(learning_rate=config.learning_rate, bias_correction=True)


def _gradient(
    model: LanguageModel, examples: Sequence[Example], rows: Sequence[int], batch_size: int
) -> tuple[Loss, float, Any]:
    """Loss, norm and mean gradient over the counted tokens of ``rows``.

    Micro-batches add nats, and gradients of nats; the one division by the
    number of tokens comes after the last of them.
    """
    module: Any = model
    value_and_grad = nn.value_and_grad(module, lambda batch: nats(model, batch))
    total: Any = None
    loss = Loss(0.0, 0)
    for start in range(0, len(rows), batch_size):
        batch: Batch = make_batch(examples, rows[start : start + batch_size])
        value, gradient = value_and_grad(batch)
        total = gradient if total is None else tree_map(mx.add, total, gradient)
        mx.eval(value, total)
        loss += Loss(float(value), batch.counted_tokens)
    total = tree_map(lambda g: g / loss.tokens, total)
    squares = [leaf.astype(mx.float32).square().sum() for leaf in dict(tree_flatten(total)).values()]
    return loss, math.sqrt(float(mx.stack(squares).sum())), total


def _check_finite(loss: Loss, norm: float, step: int, rows: Sequence[int], last: float) -> None:
    if math.isfinite(loss.nats) and math.isfinite(norm):
        return
    what = "gradient" if math.isfinite(loss.nats) else "loss"
    raise DivergedError(
        f"the {what} of step {step} is not finite (rows {some(rows)}; last finite loss {last:.4g}); "
        "the update was not made",
        fix="lower --learning-rate, or set --grad-clip 1",
    )


def _update(
    module: Any, optimizer: Any, gradient: Any, norm: float, rate: float, config: TrainConfig
) -> None:
    """Clip, and make one update."""
    if config.grad_clip is not None and norm > config.grad_clip:
        shrink = config.grad_clip / norm
        gradient = tree_map(lambda g: g * shrink, gradient)
    optimizer.learning_rate = rate
    optimizer.update(module, gradient)
    mx.eval(module.trainable_parameters(), optimizer.state)


def _validate(
    model: LanguageModel, valid_set: Sequence[Example], config: TrainConfig, step: int
) -> ValidReport:
    started = time.perf_counter()
    loss = evaluate(model, valid_set, config.batch_size, config.val_batches)
    return ValidReport(step, loss.mean, loss.tokens, time.perf_counter() - started)


class _Meter:
    """Sums between two reports."""

    def __init__(self) -> None:
        self.trained_tokens = 0
        self.last_loss = math.nan
        self._start()

    def add(self, loss: Loss, seconds: float) -> None:
        """Count one step."""
        self._loss += loss
        self._steps += 1
        self._seconds += seconds
        self.trained_tokens += loss.tokens
        self.last_loss = loss.mean

    def report(self, step: int, rate: float, norm: float) -> TrainReport:
        """What was counted; counting starts again."""
        report = TrainReport(
            step=step,
            loss=self._loss.mean,
            learning_rate=rate,
            grad_norm=norm,
            steps_per_second=self._steps / self._seconds,
            tokens_per_second=self._loss.tokens / self._seconds,
            trained_tokens=self.trained_tokens,
            peak_memory_bytes=mx.get_peak_memory(),
        )
        self._start()
        return report

    def _start(self) -> None:
        self._loss, self._steps, self._seconds = Loss(0.0, 0), 0, 0.0
