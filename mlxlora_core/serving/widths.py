"""Which numbers of rows a batch may have, so that a row gets the same bits whatever the others hold."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.serving.lanes import logits_of_rows
from mlxlora_core.serving.selection import Selection

_SMALLER = (1, 2, 4, 8, 16, 32)


def widths_alike(model: LanguageModel, selection: Selection, widest: int) -> tuple[int, ...]:
    """Numbers of rows, ascending up to ``widest``, that give each row the same logits to the last bit.

    Tried on this machine with tokens at random, in every place of a batch and beside others: how a
    product sums its numbers depends on its shape and not on the numbers, and another order shows in some
    of the logits.

    Args:
        model: evaluated as it serves.
        selection: of its adapters, all of which take part.
        widest: rows of the widest batch.

    Returns:
        Nothing where not even the place in a batch, or what stands in the other rows, is without effect.
    """
    draw = np.random.default_rng(0)
    names = [name for name in selection.names if selection.shares_batches(name)]
    for start in range(0, len(names), widest):  # what is made of each adapter for batches is made now
        _logits(model, selection, np.zeros(widest, int), [*names[start:], *[None] * widest][:widest])
    rows = [(*names, None)[place % (len(names) + 1)] for place in range(widest)]
    ids = draw.integers(0, model.vocab_size, widest)

    def logits(places: np.ndarray) -> np.ndarray:
        return _logits(model, selection, ids[places], [rows[place] for place in places])

    every = np.arange(widest)
    want = logits(every)

    def alike(places: np.ndarray) -> bool:
        return np.array_equal(logits(places), want[places])

    # An expert of a mixture may have a product of as many rows as have chosen it.
    kept, others = every % 2 == 0, draw.integers(0, model.vocab_size, widest)
    among_others = _logits(model, selection, np.where(kept, ids, others), rows)
    if not np.array_equal(among_others[kept], want[kept]):
        return ()
    if not alike(every[::-1]) or not alike(np.roll(every, 3)):
        return ()
    smaller = (width for width in _SMALLER if width < widest)
    return (*(width for width in smaller if alike(draw.permutation(widest)[:width])), widest)


def _logits(
    model: LanguageModel, selection: Selection, ids: np.ndarray, rows: Sequence[str | None]
) -> np.ndarray:
    """Logits (B, V) after each of some ids (B,), under the adapter of its row."""
    selection.use(tuple(rows))
    return np.array(logits_of_rows(model, mx.array(ids[:, None]), None))
