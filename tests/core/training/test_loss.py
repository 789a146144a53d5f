from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlxlora_core.model.ops import LARGE, cross_entropy
from mlxlora_core.training.batches import make_batch
from mlxlora_core.training.examples import Example
from mlxlora_core.training.loss import Loss, nats

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

MakeExamples = Callable[..., tuple[Example, ...]]


def reference(model: Any, examples: list[Example]) -> tuple[float, int]:
    """Sum of nats and number of targets by torch, a row at a time, from the logits of the whole model.

    What does not count gets the target that cross_entropy ignores.
    """
    total, count = 0.0, 0
    for example in examples:
        logits = torch.from_numpy(np.array(model(mx.array(example.tokens[None, :-1]))))[0]
        targets = torch.from_numpy(example.tokens[1:].astype(np.int64))
        targets[~torch.from_numpy(example.mask[1:])] = -100
        loss = torch.nn.functional.cross_entropy(logits.double(), targets, ignore_index=-100, reduction="sum")
        total, count = total + loss.item(), count + int((targets >= 0).sum())
    return total, count


@pytest.mark.parametrize("vocabulary", [33, LARGE // 10])
@pytest.mark.parametrize("scale", [1.0, 100.0, 3e4])
def test_cross_entropy_is_torch_s(scale: float, vocabulary: int) -> None:
    logits = mx.random.normal((40, vocabulary), key=mx.random.key(0)) * scale
    targets = mx.random.randint(0, vocabulary, (40,), key=mx.random.key(1))
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(np.array(logits)).double(),
        torch.from_numpy(np.array(targets)).long(),
        reduction="sum",
    )
    assert cross_entropy(logits, targets).item() == pytest.approx(want.item(), rel=1e-6)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = mx.random.normal((2000, 33), key=mx.random.key(0)).astype(mx.float16)
    targets = mx.zeros((2000,), dtype=mx.uint32)
    loss = cross_entropy(logits, targets)
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(np.array(logits)).double(), torch.zeros(2000).long(), reduction="sum"
    )
    assert loss.dtype == mx.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("vocabulary", [50, LARGE // 20])
def test_nats_of_a_batch_are_torch_s_with_ignored_positions(
    stand_in: Callable[..., Any], make_examples: MakeExamples, vocabulary: int
) -> None:
    model = stand_in(vocab_size=vocabulary)
    examples = list(make_examples([17, 4, 2, 30, 9]))
    batch = make_batch(examples, range(5))
    want, count = reference(model, examples)
    assert batch.counted_tokens == count
    assert nats(model, batch).item() == pytest.approx(want, rel=1e-6)
    # The power of this test: one position more or less is seen.
    assert abs(want / count - want / (count + 1)) > 1e-3


def test_rows_of_other_lengths_add_what_they_are_alone(
    stand_in: Callable[..., Any], make_examples: MakeExamples
) -> None:
    model = stand_in()
    examples = make_examples([17, 4, 2, 30, 9])
    alone = [nats(model, make_batch(examples, [row])).item() for row in range(5)]
    together = nats(model, make_batch(examples, [3, 1, 4, 0, 2])).item()
    assert together == pytest.approx(sum(alone), rel=1e-6)


def test_what_stands_where_rows_are_padded_changes_nothing(
    stand_in: Callable[..., Any], make_examples: MakeExamples
) -> None:
    model = stand_in()
    examples = make_examples([5, 12])
    batch = make_batch(examples, [0, 1])
    other = np.array(batch.inputs)
    other[0, 4:] = 7  # the first row predicts four tokens
    padded = type(batch)(mx.array(other), batch.positions, batch.targets)
    grad = nn.value_and_grad(model, lambda b: nats(model, b))
    (loss, gradient), (same, same_gradient) = grad(batch), grad(padded)
    assert loss.item() == same.item()
    # Embeddings of padding get no gradient either.
    for (name, a), (_, b) in zip(tree_flatten(gradient), tree_flatten(same_gradient), strict=True):
        assert mx.array_equal(a, b), name


def test_a_mean_is_taken_once() -> None:
    total = Loss(10.0, 4) + Loss(2.0, 2)
    assert (total.nats, total.tokens, total.mean) == (12.0, 6, 2.0)
    assert total.perplexity == pytest.approx(math.exp(2.0))
    assert Loss(1e6, 1).perplexity == math.inf
    assert math.isnan(Loss(math.nan, 1).perplexity)
