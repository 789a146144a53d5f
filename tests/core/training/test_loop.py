from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlxlora_core.errors import DivergedError, UsageError
from mlxlora_core.machine.processors import THREADS
from mlxlora_core.training.batches import Collator, steps_from
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.events import TrainReport, ValidReport
from mlxlora_core.training.examples import Example
from mlxlora_core.training.gradient import mean_gradient
from mlxlora_core.training.loop import Training, train
from mlxlora_core.training.optimizer import learning_rate
from mlxlora_core.training.settings import TrainConfig

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

MakeExamples = Callable[..., tuple[Example, ...]]
MakeModel = Callable[..., Any]


def lengths(count: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(2, 40) for _ in range(count)]


def config(**values: Any) -> TrainConfig:
    return TrainConfig(
        **{"iters": 6, "batch_size": 2, "learning_rate": 0.01, "steps_per_report": 1, **values}
    )


def parameters(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array(tensor) for name, tensor in tree_flatten(model.parameters())}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)


def freeze_base(model: Any) -> Any:
    """Only the linears that an adapter would go to train."""
    model.freeze()
    for block in model.layers:
        block.wq.unfreeze()
        block.wv.unfreeze()
    return model


def fit(model: Any, examples: Any, seed: int = 0, **values: Any) -> list[Any]:
    return list(train(model, examples, (), config(**values), seed))


# --- the gradient -------------------------------------------------------------


def torch_model(model: Any) -> tuple[dict[str, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """The stand-in in torch, float64, and its parameters."""
    weights = {k: torch.from_numpy(v).double().requires_grad_() for k, v in parameters(model).items()}

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        x = weights["embedding.weight"][tokens]
        for i in range(2):
            mean = torch.cumsum(x, 1) / torch.arange(1, x.shape[1] + 1)[None, :, None]
            inner = torch.nn.functional.silu(mean @ weights[f"layers.{i}.wq.weight"].T)
            x = x + inner @ weights[f"layers.{i}.wv.weight"].T + weights[f"layers.{i}.wv.bias"]
        return x @ weights["output.weight"].T + weights["output.bias"]

    return weights, forward


def torch_loss(
    forward: Callable[[torch.Tensor], torch.Tensor], examples: list[Example]
) -> tuple[torch.Tensor, int]:
    """Nats a counted token of rows, each run by itself, without padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        targets = torch.where(torch.from_numpy(example.mask), tokens, -100)[1:]
        logits = forward(tokens[None, :-1])[0]
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    return total / count, count


@pytest.mark.parametrize("batch_size", [8, 4, 2, 1, 3])
def test_the_gradient_is_torch_s_however_the_rows_are_batched(
    stand_in: MakeModel, make_examples: MakeExamples, batch_size: int
) -> None:
    model, examples = stand_in(), make_examples([17, 4, 2, 30, 9, 9, 21, 5])
    loss, norm, gradient = mean_gradient(model, Collator(examples), range(8), batch_size)
    weights, forward = torch_model(model)
    want, count = torch_loss(forward, list(examples))
    want.backward()
    assert loss.tokens == count
    assert loss.mean == pytest.approx(want.item(), rel=1e-6)
    for name, got in tree_flatten(gradient):
        np.testing.assert_allclose(np.array(got), weights[name].grad.numpy(), atol=1e-6, err_msg=name)
    squares = sum(float(weight.grad.square().sum()) for weight in weights.values())
    assert norm == pytest.approx(math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize(("batch_size", "grad_accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_training_is_the_same_however_a_step_is_cut_into_batches(
    stand_in: MakeModel, make_examples: MakeExamples, batch_size: int, grad_accumulation: int
) -> None:
    examples = make_examples(lengths(20))
    whole, cut = stand_in(), stand_in()
    first = fit(whole, examples, batch_size=8, optimizer="adam")
    second = fit(cut, examples, batch_size=batch_size, grad_accumulation=grad_accumulation)
    for one, other in zip(first, second, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


# --- the update ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adam", {}),
        ("adamw", {"weight_decay": 0.3}),
        ("adam", {"grad_clip": 0.05}),
        ("adam", {"grad_clip": 1e6}),
        ("adamw", {"schedule": "cosine", "warmup": 3, "min_learning_rate": 0.001, "grad_clip": 0.1}),
    ],
)
def test_ten_steps_are_torch_s(
    stand_in: MakeModel, make_examples: MakeExamples, optimizer: str, options: dict[str, Any]
) -> None:
    model, examples = stand_in(), make_examples(lengths(14))
    settings = config(iters=10, optimizer=optimizer, batch_size=4, **options)
    weights, forward = torch_model(model)
    reports = list(train(model, examples, (), settings, 3))
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    decay = {"weight_decay": settings.weight_decay} if optimizer == "adamw" else {}
    theirs = kind(weights.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, **decay)
    rows = steps_from(examples, 4, 3)
    clipped = 0
    for report, step in zip(reports, islice(rows, 10), strict=True):
        theirs.zero_grad()
        loss, _ = torch_loss(forward, [examples[row] for row in step])
        loss.backward()
        limit = settings.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), limit)
        clipped += bool(norm > limit)
        theirs.param_groups[0]["lr"] = report.learning_rate
        theirs.step()
        assert report.loss == pytest.approx(loss.item(), rel=1e-4)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-3)
    assert bool(clipped) == (options.get("grad_clip", 1e6) < 1)
    for name, got in parameters(model).items():
        np.testing.assert_allclose(got, weights[name].detach().numpy(), atol=2e-5, err_msg=name)


def test_the_learning_rate_is_the_formula() -> None:
    plain = TrainConfig(iters=10, learning_rate=0.5)
    assert [learning_rate(plain, step) for step in (1, 5, 10)] == [0.5] * 3
    warm = TrainConfig(iters=10, learning_rate=0.5, warmup=4)
    assert [learning_rate(warm, step) for step in range(1, 7)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    both = TrainConfig(iters=10, learning_rate=0.5, warmup=4, schedule="cosine", min_learning_rate=0.1)
    for step in range(4, 11):
        want = 0.1 + 0.4 * (1 + math.cos(math.pi * (step - 4) / 7)) / 2
        assert learning_rate(both, step) == pytest.approx(want)
    assert [learning_rate(both, step) for step in (1, 2, 3)] == [0.125, 0.25, 0.375]


@pytest.mark.parametrize(("iters", "warmup"), [(1, 0), (2, 1), (5, 0), (5, 4), (100, 10)])
def test_every_step_moves_and_the_cosine_is_torch_s(iters: int, warmup: int) -> None:
    settings = TrainConfig(iters=iters, learning_rate=1.0, warmup=warmup, schedule="cosine")
    rates = [learning_rate(settings, step) for step in range(1, iters + 1)]
    assert min(rates) > 0
    assert max(rates) == rates[max(warmup, 1) - 1] == 1.0
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=iters + 1 - max(warmup, 1))
    for rate in rates[max(warmup, 1) - 1 :]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        decay.step()


def test_the_rate_in_the_report_is_the_one_that_was_used(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    # Adam's first step moves every weight that has a gradient by its learning rate.
    for rate in (0.01, 0.002):
        model = stand_in()
        before = parameters(model)
        (report,) = fit(model, make_examples([9, 9]), iters=1, learning_rate=rate)
        moved = np.abs(parameters(model)["output.bias"] - before["output.bias"])
        assert report.learning_rate == rate
        assert moved.max() == pytest.approx(rate, rel=1e-3)


# --- what changes, and what does not ------------------------------------------


def test_only_what_trains_changes_and_the_rest_is_the_same_bit_for_bit(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    model = freeze_base(stand_in())
    before = parameters(model)
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    fit(model, make_examples(lengths(9)), optimizer="adamw", weight_decay=0.5)
    for name, after in parameters(model).items():
        assert np.array_equal(before[name], after) == (name not in trained), name
    assert 0 < len(trained) < len(before)


def test_training_lowers_the_loss(stand_in: MakeModel, make_examples: MakeExamples) -> None:
    model, examples = stand_in(), make_examples(lengths(8))
    before = evaluate(model, examples, 4).mean
    fit(model, examples, iters=60, learning_rate=0.03)
    assert evaluate(model, examples, 4).mean < before - 1


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    examples = make_examples(lengths(9))
    found = []
    for seed in (0, 0, 1, 2**32 - 1):
        model = stand_in()
        model.layers[0].wq = nn.Sequential(nn.Dropout(0.3), model.layers[0].wq)
        mx.random.seed(len(found))  # what was drawn before does not matter
        fit(model, examples, seed=seed)
        found.append(parameters(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2]) and not same(found[0], found[3])


def test_validating_and_reporting_more_often_changes_nothing(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    examples, valid = make_examples(lengths(9)), make_examples(lengths(5), seed=1)
    found = []
    for every in (1, 2, 100):
        model = stand_in()
        model.layers[0].wq = nn.Sequential(nn.Dropout(0.3), model.layers[0].wq)
        settings = config(steps_per_eval=every, steps_per_report=every)
        for _ in train(model, examples, valid, settings, 0):
            np.random.random()
            mx.random.uniform()
            model.eval()  # as a caller does who generates between two reports
        found.append(parameters(model))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_dropout_is_on_and_another_one_each_step(stand_in: MakeModel, make_examples: MakeExamples) -> None:
    model = stand_in()
    model.layers[0].wq = nn.Sequential(nn.Dropout(0.3), model.layers[0].wq)
    losses = []
    for report in train(model, make_examples([30]), (), config(learning_rate=1e-12), 0):
        losses.append(report.loss)
        model.eval()
    assert len(set(losses)) == len(losses) == 6


def test_a_dataset_smaller_than_a_batch_trains(stand_in: MakeModel, make_examples: MakeExamples) -> None:
    reports = fit(stand_in(), make_examples([5, 8]), batch_size=16, grad_accumulation=2)
    assert len(reports) == 6
    assert reports[-1].loss < reports[0].loss


# --- reports ------------------------------------------------------------------


def test_reports_come_when_they_are_due_and_validation_is_always_the_same_set(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    model, valid = stand_in(), make_examples(lengths(7), seed=1)
    want = evaluate(model, valid, 2).mean
    settings = config(iters=7, steps_per_report=3, steps_per_eval=2, val_batches=-1)
    reports = []
    for report in train(model, make_examples(lengths(9)), valid, settings, 0):
        reports.append(report)
        if isinstance(report, ValidReport):
            assert report.loss == evaluate(model, valid, 2).mean
    assert [(type(r).__name__, r.step) for r in reports] == [
        ("ValidReport", 0),
        ("ValidReport", 2),
        ("TrainReport", 3),
        ("ValidReport", 4),
        ("TrainReport", 6),
        ("ValidReport", 6),
        ("TrainReport", 7),
        ("ValidReport", 7),
    ]
    assert reports[0].loss == want
    assert len({r.tokens for r in reports if isinstance(r, ValidReport)}) == 1


def test_a_report_is_the_mean_over_the_tokens_of_its_steps(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    examples = make_examples([40, 3, 22, 2, 9])
    single = fit(stand_in(), examples, iters=5)
    both = fit(stand_in(), examples, iters=5, steps_per_report=5)
    tokens = np.diff([0, *(report.trained_tokens for report in single)])
    losses = [report.loss for report in single]
    assert both[0].loss == pytest.approx(np.average(losses, weights=tokens), rel=1e-6)
    assert abs(np.mean(losses) - both[0].loss) > 1e-4
    assert both[0].trained_tokens == tokens.sum()
    assert both[0].tokens_per_second / both[0].steps_per_second == pytest.approx(tokens.sum() / 5)
    assert both[0].peak_memory_bytes > 0


def test_without_rows_to_validate_on_there_are_no_validations(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    assert all(isinstance(report, TrainReport) for report in fit(stand_in(), make_examples([5])))


def test_the_model_is_left_ready_to_answer(stand_in: MakeModel, make_examples: MakeExamples) -> None:
    model = stand_in()
    stopped = train(model, make_examples([5, 6]), (), config(), 0)
    next(stopped)
    assert model.training
    stopped.close()
    assert not model.training
    fit(model, make_examples([5, 6]))
    assert not model.training


# --- divergence ---------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_update(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    model = freeze_base(stand_in())
    reports = train(model, make_examples(lengths(9)), (), config(), 0)
    last = next(reports)
    model.output.bias = mx.full(model.output.bias.shape, float("nan"))
    before = parameters(model)
    with pytest.raises(DivergedError, match=rf"loss of step 2 is not finite \(rows .*{last.loss:.4g}\)"):
        next(reports)
    assert same(before, parameters(model))


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    @mx.custom_function
    def poison(x: mx.array) -> mx.array:
        return x

    @poison.vjp
    def poisoned(primals: Any, cotangent: Any, output: Any) -> Any:
        return cotangent * float("nan")

    model = stand_in()
    head = model.output
    model.head = lambda hidden: head(poison(hidden))
    before = parameters(model)
    with pytest.raises(DivergedError, match=r"gradient of step 1 is not finite.*update was not made.*Fix: "):
        fit(model, make_examples([5, 6]))
    assert same(before, parameters(model))


def test_a_validation_that_is_not_finite_is_told_and_the_next_step_has_the_last_word(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    settings = config(learning_rate=1e30, steps_per_eval=1)
    reports = train(stand_in(), make_examples([5, 6]), make_examples([7]), settings, 0)
    assert [next(reports).step for _ in range(2)] == [0, 1]
    assert math.isnan(next(reports).loss)
    with pytest.raises(DivergedError):
        next(reports)


def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(
    stand_in: MakeModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(THREADS, "1")  # the head is called once a step
    examples = make_examples(lengths(12))
    plain, poisoned = freeze_base(stand_in()), freeze_base(stand_in())
    fit(plain, examples, iters=2)
    head, calls = poisoned.head, iter(range(100))
    poisoned.head = lambda hidden: head(hidden) * (math.nan if next(calls) >= 2 else 1.0)
    (report,) = fit(poisoned, examples, iters=5, steps_per_report=5, on_nonfinite="skip")
    assert report.skipped == 3 and math.isfinite(report.loss)
    assert same(parameters(plain), parameters(poisoned))


def test_clipped_steps_are_counted(stand_in: MakeModel, make_examples: MakeExamples) -> None:
    examples = make_examples(lengths(12))
    norms = sorted(report.grad_norm for report in fit(stand_in(), examples, learning_rate=1e-9))
    limit = (norms[2] + norms[3]) / 2
    reports = fit(stand_in(), examples, learning_rate=1e-9, grad_clip=limit, steps_per_report=6)
    assert [report.clipped for report in reports] == [3]
    assert fit(stand_in(), examples, iters=1, grad_clip=1e9)[0].clipped == 0


def test_patience_needs_rows_to_validate_on(stand_in: MakeModel, make_examples: MakeExamples) -> None:
    with pytest.raises(UsageError, match="patience needs rows to validate on"):
        fit(stand_in(), make_examples([5]), patience=1)


def test_a_step_is_consistent_when_its_reports_are_given(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    training = Training(stand_in(), make_examples(lengths(9)), make_examples([7]), config(iters=3), 0)
    steps = []
    for reports in training:
        steps.append(training.progress.step)
        assert {report.step for report in reports} == {training.progress.step}
        assert int(training.optimizer_tensors()["step"]) == training.progress.step
    assert steps == [0, 1, 2, 3] and training.finished
