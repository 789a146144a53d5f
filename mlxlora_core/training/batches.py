"""Examples -> batches, in an order that is a function of (seed, epoch) alone.

A position in training is therefore one integer. The shift by one token happens in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx
import numpy as np

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.training.examples import Example
from mlxlora_core.training.shapes import Shapes

T = TypeVar("T")
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded on the right; or packed, one after the other in a single row.

    Attributes:
        inputs: ids (B, T), packed (1, T).
        positions: indices into the flattened ``inputs`` of the positions whose next token counts in
            the loss, (N,).
        targets: those next tokens, (N,).
        weights: float32 (N,): 1, and 0 for the positions at the end that only bring N to a fixed
            number; None is 1 for all.
        counted: how many of the N count; None is all.
        padding: how many positions in ``inputs`` are padding.
        lengths: of each row in a packed batch, in tokens; None where rows are side by side.
        hidden: the input of layer ``first``, (B, T, D), if it is already known.
        first: the lowest layer to run.
        dropout_keys: two words for each position in ``inputs``, (B, T, 2) uint32; None of a model
            without dropout. See :mod:`mlxlora_core.training.dropout_keys`.
    """

    inputs: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array | None = None
    counted: int | None = None
    padding: int = 0
    lengths: tuple[int, ...] | None = None
    hidden: mx.array | None = None
    first: int = 0
    dropout_keys: mx.array | None = None

    @property
    def counted_tokens(self) -> int:
        """How many tokens count in the loss."""
        return self.targets.size if self.counted is None else self.counted

    @property
    def starts(self) -> Sequence[int]:
        """Where each row begins in the flattened ``inputs``."""
        rows, width = self.inputs.shape
        if self.lengths is None:
            return range(0, rows * width, width)
        return list(accumulate(self.lengths[:-1], initial=0))


def make_batch(
    examples: Sequence[Example], rows: Sequence[int], packing: bool = False, shapes: Shapes | None = None
) -> Batch:
    """The batch of some rows of ``examples``; padding is never among the positions that count.

    Args:
        examples: of a split.
        rows: indices into ``examples``.
        packing: whether rows are packed one after the other instead of padded.
        shapes: if given, a padded batch is filled up to one of these; the loss does not change.
    """
    parts = [_shifted(examples[row]) for row in rows]
    lengths = tuple(len(inputs) for inputs, _, _ in parts)
    width = max(lengths) if shapes is None else shapes.width(max(lengths))
    starts = np.cumsum((0, *lengths)) if packing else np.arange(len(rows) + 1) * width
    tokens = np.zeros(starts[-1], np.uint32)
    for start, (inputs, _, _) in zip(starts, parts, strict=False):
        tokens[start : start + len(inputs)] = inputs
    counted = [start + np.flatnonzero(mask) for start, (_, _, mask) in zip(starts, parts, strict=False)]
    batch = Batch(
        mx.array(tokens.reshape((1, -1) if packing else (-1, width))),
        mx.array(np.concatenate(counted)),
        mx.array(np.concatenate([targets[mask] for _, targets, mask in parts])),
        padding=tokens.size - sum(lengths),
        lengths=lengths if packing else None,
    )
    return batch if shapes is None else _brought_to(shapes, batch)


def _brought_to(shapes: Shapes, batch: Batch) -> Batch:
    """A batch filled up to the number of rows and positions that all batches of its width have.

    The filling repeats the first row and the first position, so it can hold no fault of its own.
    """
    rows, width = batch.inputs.shape
    count, more = batch.targets.size, shapes.rows - rows
    spare = shapes.positions(width) - count

    def longer(x: mx.array, by: int) -> mx.array:
        return mx.concatenate([x, *[x[:1]] * by])

    return replace(
        batch,
        inputs=longer(batch.inputs, more),
        positions=longer(batch.positions, spare),
        targets=longer(batch.targets, spare),
        weights=(mx.arange(count + spare) < count).astype(mx.float32),
        counted=count,
        padding=batch.padding + more * width,
    )


def _shifted(example: Example) -> tuple[Array, Array, Array]:
    """The inputs of a row, the target of each, and whether that target counts."""
    return example.tokens[:-1], example.tokens[1:], example.mask[1:]  # the one shift


@dataclass(frozen=True)
class Collator:
    """Makes batches of rows of one split.

    Attributes:
        examples: its rows.
        packing: whether rows are packed.
        entering: returns the kept input of layer ``first`` for the rows of a batch, or None.
        first: that layer.
        shapes: the shapes that padded batches are filled up to, if there are to be few.
    """

    examples: Sequence[Example]
    packing: bool = False
    entering: Callable[[Sequence[int], Batch], mx.array | None] | None = None
    first: int = 0
    shapes: Shapes | None = None

    def __call__(self, rows: Sequence[int]) -> Batch:
        """The batch of some rows."""
        batch = make_batch(self.examples, rows, self.packing, self.shapes)
        hidden = self.entering(rows, batch) if self.entering is not None else None
        return batch if hidden is None else replace(batch, hidden=hidden, first=self.first)


def longest_of(examples: Sequence[Example]) -> int:
    """Tokens of the longest example; 1 if there are no examples."""
    return max((len(example.tokens) for example in examples), default=1)


def epoch_order(
    examples: Sequence[Example], rows_a_step: int, seed: int, epoch: int, by_length: bool = False
) -> list[list[int]]:
    """The rows of each step of one epoch, every row once; within a step they are in order of length.

    A function of (seed, epoch) alone. Whoever changes it must increment ``identity.ORDER_OF_ROWS``.

    Args:
        examples: of the split.
        rows_a_step: rows in a step; the last step may have fewer.
        seed: of the training.
        epoch: counted from 0.
        by_length: whether rows of similar length share a step. Lengths are jittered before sorting,
            so that the rows of a step differ from epoch to epoch.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    lengths = np.array([len(example.tokens) for example in examples])
    if not by_length:
        drawn = _parts(random.permutation(len(lengths)).tolist(), rows_a_step)
        return [sorted(step, key=lambda row: (lengths[row], row)) for step in drawn]
    order = np.argsort(lengths * random.uniform(1.0, 1.05, len(lengths)), kind="stable")
    steps = list(_parts(order.tolist(), rows_a_step))
    return [steps[i] for i in random.permutation(len(steps))]


def steps_an_epoch(rows: int, rows_a_step: int) -> int:
    """Steps in an epoch; the last of them may have fewer rows."""
    return -(-rows // rows_a_step)


def steps_from(
    examples: Sequence[Example], rows_a_step: int, seed: int, cursor: int = 0, by_length: bool = False
) -> Iterator[list[int]]:
    """The rows of step ``cursor``, from 0, and of all steps after it, forever; see :func:`epoch_order`."""
    epoch, start = divmod(cursor, steps_an_epoch(len(examples), rows_a_step))
    while True:
        yield from epoch_order(examples, rows_a_step, seed, epoch, by_length)[start:]
        epoch, start = epoch + 1, 0


def fixed_rows(
    examples: Sequence[Example], batch_size: int, batches: int, group: Group = ALONE
) -> Iterator[Sequence[int]]:
    """The rows of ``batches`` batches, or of all for -1, the same each time.

    If that is not all rows, they are taken at even distances, to represent the whole file. Each rank
    of a group gets batches of its own share: rows sorted by length are dealt out in turn.
    """
    count = len(examples) if batches < 0 else min(len(examples), batches * batch_size)
    rows = (i * len(examples) // count for i in range(count))
    ordered = sorted(rows, key=lambda row: len(examples[row].tokens))
    return _parts(ordered[group.rank :: group.size], batch_size)


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of ``size`` items, the last one shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))
