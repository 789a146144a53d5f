"""Examples -> batches, in an order that is a function of (seed, epoch) alone.

So a place in training is one integer. The shift by one token happens in one
line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxlora_core.training.examples import Example
from mlxlora_core.training.shapes import Shapes

T = TypeVar("T")
Numbers: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded on the right.

    Attributes:
        inputs: ids (B, T).
        positions: the places in ``inputs``, counted through its rows, whose
            next token counts in the loss, (N,).
        targets: those next tokens, (N,).
        weights: float32 (N,), 0 for what stands at the end of the positions to make them as
            many as in other batches, and else 1; None is 1 for all.
        counted: how many of the N count; None is all.
    """

    inputs: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array | None = None
    counted: int | None = None

    @property
    def counted_tokens(self) -> int:
        """How many tokens count in the loss."""
        return self.targets.size if self.counted is None else self.counted


def make_batch(examples: Sequence[Example], rows: Sequence[int], shapes: Shapes | None = None) -> Batch:
    """The batch of some rows of ``examples``; padding is never among the positions that count.

    Args:
        examples: of which it takes some.
        rows: which.
        shapes: what it is brought to one of, which cannot be seen in its loss.
    """
    chosen = [examples[row] for row in rows]
    width = max(len(example.tokens) for example in chosen) - 1
    if shapes is None:
        inputs, positions, targets = _padded(chosen, width)
        return Batch(mx.array(inputs), mx.array(positions), mx.array(targets))
    width, most = shapes.of(width)
    inputs, positions, targets = _padded(chosen, width)
    # More of the first of each, so that nothing can go wrong there alone.
    inputs = np.concatenate([inputs, *[inputs[:1]] * (shapes.rows - len(rows))])
    count, spare = len(positions), most - len(positions)
    positions, targets = (np.concatenate([x, np.repeat(x[:1], spare)]) for x in (positions, targets))
    weights = (np.arange(most) < count).astype(np.float32)
    return Batch(mx.array(inputs), mx.array(positions), mx.array(targets), mx.array(weights), count)


def _padded(chosen: Sequence[Example], width: int) -> tuple[Numbers, Numbers, Numbers]:
    """Inputs, positions and targets of some rows side by side."""
    tokens = np.zeros((len(chosen), width + 1), np.uint32)
    counts = np.zeros((len(chosen), width + 1), bool)
    for i, example in enumerate(chosen):
        tokens[i, : len(example.tokens)] = example.tokens
        counts[i, : len(example.tokens)] = example.mask
    inputs, targets, mask = tokens[:, :-1], tokens[:, 1:], counts[:, 1:]  # the one shift
    return inputs, np.flatnonzero(mask), targets[mask]


@dataclass(frozen=True)
class Collator:
    """Makes batches of rows of one split.

    Attributes:
        examples: its rows.
        shapes: what the batches are brought to, where they are to be of few shapes.
    """

    examples: Sequence[Example]
    shapes: Shapes | None = None

    def __call__(self, rows: Sequence[int]) -> Batch:
        """The batch of some rows."""
        return make_batch(self.examples, rows, self.shapes)


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


def steps_from(
    examples: Sequence[Example], rows_a_step: int, seed: int, cursor: int = 0
) -> Iterator[list[int]]:
    """The rows of step ``cursor``, of the one after it, and so on without end."""
    steps_an_epoch = -(-len(examples) // rows_a_step)
    epoch, start = divmod(cursor, steps_an_epoch)
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
