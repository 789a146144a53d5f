"""Examples -> batches, in an order that is a function of (seed, epoch) alone.

So a place in training is one integer. The shift by one token happens in one
line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlxlora_core.training.examples import Example

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded on the right.

    Attributes:
        inputs: ids (B, T).
        positions: the places in ``inputs``, counted through its rows, whose
            next token counts in the loss, (N,).
        targets: those next tokens, (N,).
        hidden: what enters layer ``first``, (B, T, D), where that is known already.
        first: the lowest layer to run.
    """

    inputs: mx.array
    positions: mx.array
    targets: mx.array
    hidden: mx.array | None = None
    first: int = 0

    @property
    def counted_tokens(self) -> int:
        """N: how many tokens count in the loss."""
        return self.targets.size


def make_batch(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """The batch of some rows of ``examples``; padding is never among its positions."""
    chosen = [examples[row] for row in rows]
    width = max(len(example.tokens) for example in chosen) - 1
    tokens = np.zeros((len(rows), width + 1), np.uint32)
    counts = np.zeros((len(rows), width + 1), bool)
    for i, example in enumerate(chosen):
        tokens[i, : len(example.tokens)] = example.tokens
        counts[i, : len(example.tokens)] = example.mask
    inputs, targets, mask = tokens[:, :-1], tokens[:, 1:], counts[:, 1:]  # the one shift
    return Batch(mx.array(inputs), mx.array(np.flatnonzero(mask)), mx.array(targets[mask]))


@dataclass(frozen=True)
class Collator:
    """Makes batches of rows of one split.

    Attributes:
        examples: its rows.
        entering: what enters layer ``first`` for the rows of a batch, where that is kept.
        first: that layer.
    """

    examples: Sequence[Example]
    entering: Callable[[Sequence[int], Batch], mx.array | None] | None = None
    first: int = 0

    def __call__(self, rows: Sequence[int]) -> Batch:
        """The batch of some rows."""
        batch = make_batch(self.examples, rows)
        hidden = self.entering(rows, batch) if self.entering is not None else None
        return batch if hidden is None else replace(batch, hidden=hidden, first=self.first)


def longest_of(examples: Sequence[Example]) -> int:
    """Tokens of the longest of some examples; 1 where there is none."""
    return max((len(example.tokens) for example in examples), default=1)


def epoch_order(examples: Sequence[Example], rows_a_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each step of one epoch: every row once, rows of like length together.

    A function of (seed, epoch) alone. Lengths are jittered before they are
    sorted, so that the company a row keeps changes from epoch to epoch.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    lengths = np.array([len(example.tokens) for example in examples])
    order = np.argsort(lengths * random.uniform(1.0, 1.2, len(lengths)), kind="stable")
    steps = list(_parts(order.tolist(), rows_a_step))
    return [steps[i] for i in random.permutation(len(steps))]


def steps_an_epoch(rows: int, rows_a_step: int) -> int:
    """Steps in which every row comes once; the last of them may have fewer rows."""
    return -(-rows // rows_a_step)


def steps_from(
    examples: Sequence[Example], rows_a_step: int, seed: int, cursor: int = 0
) -> Iterator[list[int]]:
    """The rows of step ``cursor``, of the one after it, and so on without end."""
    epoch, start = divmod(cursor, steps_an_epoch(len(examples), rows_a_step))
    while True:
        yield from epoch_order(examples, rows_a_step, seed, epoch)[start:]
        epoch, start = epoch + 1, 0


def fixed_rows(examples: Sequence[Example], batch_size: int, batches: int) -> Iterator[Sequence[int]]:
    """The rows of the same batches each time, tail included: ``batches`` of them, or for -1 all rows.

    Where that is not all rows, they are taken at even distances, so that they
    stand for the whole file.
    """
    count = len(examples) if batches < 0 else min(len(examples), batches * batch_size)
    rows = (i * len(examples) // count for i in range(count))
    return _parts(sorted(rows, key=lambda row: len(examples[row].tokens)), batch_size)


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of ``size`` items, the last one shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))
