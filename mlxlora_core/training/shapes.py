"""The few shapes that batches are padded to, each of which is compiled once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlxlora_core.training.examples import Example

#: widths of batches in a training; with the update, a step is compiled a dozen times at most
MOST_WIDTHS = 11
#: lengths that widths are chosen among; more are rounded up to as many
_LENGTHS = 1024


@dataclass(frozen=True)
class Shapes:
    """The shapes of the batches of a training.

    Attributes:
        rows: of each batch.
        widths: ascending; the last is that of the longest row.
        counted: for each width, as many positions as count in any batch of that width.
    """

    rows: int
    widths: tuple[int, ...]
    counted: tuple[int, ...]

    def width(self, width: int) -> int:
        """The width that a batch of some width is brought to."""
        return self.widths[bisect_left(self.widths, width)]

    def positions(self, width: int) -> int:
        """How many positions all batches of one of the widths have."""
        return self.counted[self.widths.index(width)]


def shapes_of(examples: Sequence[Example], batch_size: int, most: int = MOST_WIDTHS) -> Shapes:
    """Shapes for the batches of some rows, so many widths at most; a function of the rows alone.

    The widths are those with the least padding if each row stood in a batch of rows like itself.
    """
    inputs = np.array([len(example.tokens) - 1 for example in examples])
    counts = np.array([int(example.mask[1:].sum()) for example in examples])
    rows = min(batch_size, len(examples))
    widths = _widths(inputs, most)
    counted = tuple(int(np.sort(counts[inputs <= width])[-rows:].sum()) for width in widths)
    return Shapes(rows, widths, counted)


def _widths(inputs: npt.NDArray[np.int64], most: int) -> tuple[int, ...]:
    """At most so many widths with the least padding, by dynamic programming over the lengths in order."""
    step = -(-int(inputs.max()) // _LENGTHS)
    rounded = np.minimum(-(-inputs // step) * step, inputs.max())
    lengths, rows = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(rows)])  # rows of the first n lengths
    least = np.full(len(lengths) + 1, np.inf)  # padded width of the rows of the first n lengths
    least[0] = 0
    choices = []
    for _ in range(min(most, len(lengths))):
        # From the i-th length on up to the j-th, all rows are as wide as the j-th.
        made = least[:-1, None] + (before[None, 1:] - before[:-1, None]) * lengths[None, :]
        made[np.tril_indices(len(lengths), -1)] = np.inf
        choices.append(made.argmin(axis=0))
        least = np.concatenate([[np.inf], made.min(axis=0)])
    chosen, end = [], len(lengths)
    for choice in reversed(choices):
        chosen.append(int(lengths[end - 1]))
        end = int(choice[end - 1])
        if end == 0:
            break
    return tuple(reversed(chosen))
