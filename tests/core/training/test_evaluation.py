from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora_core.errors import DivergedError
from mlxlora_core.training.batches import make_batch
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.examples import Example
from mlxlora_core.training.loss import nats

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
