"""Rows of a batch dealt out to cores give what they give together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora_core.machine import device
from mlxlora_core.machine.device import on_cpu
from mlxlora_core.machine.processors import THREADS
from mlxlora_core.training import parallel
from mlxlora_core.training.batches import Collator
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.examples import Example
from mlxlora_core.training.gradient import mean_gradient
from mlxlora_core.training.parallel import side_by_side

cpu_only = pytest.mark.skipif(not on_cpu(), reason="a GPU takes a batch whole")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of threads that a runtime was told, with four cores to deal to."""
    told: list[int] = []
    monkeypatch.setenv(THREADS, "4")
    monkeypatch.setattr(device, "_setters", [told.append])
    yield told


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("threads_in_products", [True, False])
def test_every_row_is_dealt_once(
    count: int, rows: int, threads_in_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(THREADS, str(count))
    monkeypatch.setattr(device, "_setters", [print] if threads_in_products else [])
    parts = parallel.split_rows(range(100, 100 + rows), [9] * rows)
    assert sorted(row for part in parts for row in part) == list(range(100, 100 + rows))
    assert len(parts) <= count
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if not threads_in_products:
        assert len(parts) == min(count, rows)


def test_products_get_all_cores_where_parts_would_leave_them_idle(told: list[int]) -> None:
    assert [len(parallel.split_rows(range(rows), [9] * rows)) for rows in (1, 2, 3, 4, 8)] == [1, 1, 3, 4, 4]


def test_a_product_takes_one_thread_inside_and_all_cores_after_it(told: list[int]) -> None:
    with pytest.raises(ZeroDivisionError), device.product_threads(1):
        assert told == [1]
        raise ZeroDivisionError
    assert told == [1, 4]


@cpu_only
def test_parts_are_on_streams_of_their_own(told: list[int], make_examples: Any) -> None:
    streams: list[mx.Stream] = []
    threads: list[int] = []

    def look(batch: Any) -> mx.array:
        streams.append(mx.default_stream(mx.default_device()))
        threads.append(len(told))
        return batch.inputs.sum()

    lengths = [5, 6, 7, 8, 9]
    parts = side_by_side(look, Collator(make_examples(lengths)), [0, 1, 2, 3, 4], lengths)
    assert [batch.inputs.shape for batch, _ in parts] == [(1, 8), (1, 7), (1, 6), (2, 5)]
    assert len({str(stream) for stream in streams}) == 4
    assert mx.default_stream(mx.default_device()) not in streams
    assert told == [1, 4]


@pytest.mark.parametrize("batch_size", [6, 4, 1])
def test_gradient_and_loss_are_those_of_one_core(
    batch_size: int, stand_in: Callable[..., Any], make_examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = stand_in(), make_examples([17, 4, 2, 30, 9, 9])

    def found(count: int) -> tuple[Any, float, dict[str, Any], Any]:
        monkeypatch.setenv(THREADS, str(count))
        loss, norm, gradient = mean_gradient(model, Collator(examples), range(6), batch_size)
        return loss, norm, dict(tree_flatten(gradient)), evaluate(model, examples, batch_size)

    loss, norm, gradient, valid = found(1)
    for count in (2, 3, 5):
        other_loss, other_norm, other, other_valid = found(count)
        assert other_loss.tokens == loss.tokens and other_valid.tokens == valid.tokens
        assert other_loss.nats == pytest.approx(loss.nats, rel=1e-6)
        assert other_valid.nats == pytest.approx(valid.nats, rel=1e-6)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        for name, want in gradient.items():
            np.testing.assert_allclose(np.array(other[name]), np.array(want), rtol=1e-4, atol=1e-6)


@cpu_only
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_seed_gives_the_same_bits_on_the_same_cores(
    count: int, make_examples: Callable[..., tuple[Example, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: each part draws its own, in the order of the parts, whichever ends first."""
    monkeypatch.setenv(THREADS, str(count))
    model: Any = Dropping()
    examples = make_examples([40, 9, 30, 12, 25, 3, 18])
    model.train()

    def found() -> list[Any]:
        mx.random.seed(7)
        _, _, gradient = mean_gradient(model, Collator(examples), range(7), 4)
        return [np.array(leaf) for _, leaf in tree_flatten(gradient)]

    first = found()
    for _ in range(5):
        assert all(map(np.array_equal, first, found()))
    mx.random.seed(8)
    _, _, other = mean_gradient(model, Collator(examples), range(7), 4)
    assert not np.array_equal(first[0], np.array(tree_flatten(other)[0][1]))


class Dropping(nn.Module):
    """A language model with a dropout and products large enough to take a while."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 50
        self.embedding = nn.Embedding(50, 64)
        self.inner = [nn.Linear(64, 64) for _ in range(3)]
        self.dropout = nn.Dropout(0.3)

    def embed(self, tokens: mx.array) -> mx.array:
        return self.embedding(tokens)

    def run(self, hidden: mx.array) -> mx.array:
        for linear in self.inner:
            hidden = hidden + linear(self.dropout(hidden))
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        return self.embedding.as_linear(hidden)
