from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora_core.errors import DivergedError, ResourceError
from mlxlora_core.machine import memory as machine
from mlxlora_core.model import memory
from mlxlora_core.model.memory import measuring_bytes, sizes_of
from mlxlora_core.training import evaluation
from mlxlora_core.training.batches import longest_of, make_batch
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.examples import Example
from mlxlora_core.training.loss import nats
from mlxlora_core.training.parallel import side_by_side

MakeExamples = Callable[..., tuple[Example, ...]]


def lengths(count: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(2, 60) for _ in range(count)]


def test_the_loss_of_all_rows_does_not_depend_on_the_batch_size(
    stand_in: Callable[..., Any], make_examples: MakeExamples
) -> None:
    model, examples = stand_in(), make_examples(lengths(53))
    alone = [nats(model, make_batch(examples, [row])).item() for row in range(53)]
    counted = sum(int(example.mask.sum()) for example in examples)
    for batch_size in (1, 2, 7, 52, 53, 100):
        loss = evaluate(model, examples, batch_size)
        assert loss.tokens == counted
        assert loss.mean == pytest.approx(sum(alone) / counted, rel=1e-6)


def test_rows_are_measured_fewer_at_a_time_where_a_batch_takes_more_than_it_may(
    stand_in: Callable[..., Any], make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = stand_in(), make_examples(lengths(53))
    whole, seen = evaluate(model, examples, 16), []

    def watched(compute: Any, collate: Any, rows: Any, lengths: Any) -> Any:
        seen.append(
            (len(rows), measuring_bytes(sizes_of(model), len(rows), longest_of([examples[r] for r in rows])))
        )
        return side_by_side(compute, collate, rows, lengths)

    monkeypatch.setattr(evaluation, "side_by_side", watched)
    row = measuring_bytes(sizes_of(model), 1, 60)
    for most in (10 * row, 3 * row, row, 1):
        seen.clear()
        loss = evaluate(model, examples, 16, most_bytes=most)
        assert loss.tokens == whole.tokens and loss.nats == pytest.approx(whole.nats, rel=1e-6)
        assert sum(rows for rows, _ in seen) == 53
        assert all(rows == 1 or taken <= most for rows, taken in seen)
    assert all(rows == 1 for rows, _ in seen), "a row at least"


def test_a_row_that_does_not_fit_is_refused(
    stand_in: Callable[..., Any], make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)
    monkeypatch.setattr(evaluation, "free_memory_bytes", lambda: 1000)
    monkeypatch.setattr(machine, "_rooms", lambda root: [machine._Room(0, 1000, "memory")])
    with pytest.raises(ResourceError, match="measuring the loss needs about"):
        evaluate(stand_in(), make_examples([40]), 1)


def test_it_is_the_same_each_time_and_leaves_random_numbers_alone(
    stand_in: Callable[..., Any], make_examples: MakeExamples
) -> None:
    model, examples = stand_in(), make_examples(lengths(20))
    mx.random.seed(5)
    want = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(5)
    first = evaluate(model, examples, 4, batches=3)
    assert mx.random.uniform(shape=(3,)).tolist() == want
    assert evaluate(model, examples, 4, batches=3) == first
    assert first.tokens < evaluate(model, examples, 4).tokens


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_it_measures_and_the_mode_comes_back(
    stand_in: Callable[..., Any], make_examples: MakeExamples, training: bool
) -> None:
    model, examples = stand_in(), make_examples(lengths(5))
    want = evaluate(model, examples, 2)
    head = model.output
    model.output = nn.Sequential(nn.Dropout(0.5), head)
    model.train(training)
    assert evaluate(model, examples, 2) == want
    assert model.training is training


def test_a_loss_that_is_not_finite_is_an_error(
    stand_in: Callable[..., Any], make_examples: MakeExamples
) -> None:
    model = stand_in()
    model.output.bias = mx.full(model.output.bias.shape, float("nan"))
    model.train()
    with pytest.raises(DivergedError, match="not finite"):
        evaluate(model, make_examples([5]), 2)
    assert model.training
