"""The few shapes that batches are padded to, each of which is compiled once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlxlora_core.training.examples import Example

#: most widths of batches in a training; with the update, a step is compiled at most a dozen times
MOST_WIDTHS = 11
#: most lengths that widths are chosen among; if there are more, they are rounded up
_LENGTHS = 1024


@dataclass(frozen=True)
class Shapes:
    """The shapes of the batches of a training.

    Attributes:
        rows: in each batch.
        widths: ascending; the last is that of the longest row.
        counted: for each width, the most positions that can count in a batch of that width.
    """

    rows: int
    widths: tuple[int, ...]
    counted: tuple[int, ...]

    def width(self, width: int) -> int:
        """The width that a batch of the given width is padded to."""
        return self.widths[bisect_left(self.widths, width)]

    def positions(self, width: int) -> int:
        """How many counted positions all batches of one of the widths are filled up to."""
        return self.counted[self.widths.index(width)]


def shapes_of(examples: Sequence[Example], batch_size: int, most: int = MOST_WIDTHS) -> Shapes:
    """Shapes for the batches of some rows, with at most ``most`` widths; a function of the rows alone.

    The widths minimize padding for batches whose rows all have the same length.
    """
    inputs = np.array([len(example.tokens) - 1 for example in examples])
    counts = np.array([int(example.mask[1:].sum()) for example in examples])
    rows = min(batch_size, len(examples))
    widths = _widths(inputs, most)
    counted = tuple(int(np.sort(counts[inputs <= width])[-rows:].sum()) for width in widths)
    return Shapes(rows, widths, counted)


def _widths(inputs: npt.NDArray[np.int64], most: int) -> tuple[int, ...]:
    """The widths, at most ``most``, with the least padding: dynamic programming over the sorted lengths."""
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
