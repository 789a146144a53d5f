"""Which numbers of rows a batch may have, so that a row gets the same bits whatever the others hold."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.serving.lanes import logits_of_rows
from mlxlora_core.serving.selection import Selection


def widths_alike(model: LanguageModel, selection: Selection, widest: int) -> tuple[int, ...]:
    """Numbers of rows, ascending up to ``widest``, that give each row the same logits to the last bit.

    Tried on this machine with tokens at random, in every place of a batch: how a product sums its
    numbers depends on its shape and not on the numbers, and another order shows in some of the logits.

    Args:
        model: evaluated as it serves.
        selection: of its adapters, all of which take part.
        widest: rows of the widest batch.

    Returns:
        Nothing where not even the place in a batch is without effect.
    """
    draw = np.random.default_rng(0)
    ids = draw.integers(0, model.vocab_size, widest)
    names = [name for name in selection.names if selection.shares_batches(name)]
    rows = [(*names, None)[place % (len(names) + 1)] for place in range(widest)]

    def logits(places: np.ndarray) -> np.ndarray:
        selection.use(tuple(rows[place] for place in places))
        return np.array(logits_of_rows(model, mx.array(ids[places][:, None]), None))

    every = np.arange(widest)
    want = logits(every)
    if any(not np.array_equal(logits(turned), want[turned]) for turned in (every[::-1], np.roll(every, 3))):
        return ()
    smaller = [width for width in (1, 2, 4, 8, 16, 32) if width < widest]
    same = [w for w in smaller if _agree(lambda places: logits(places), want, w, draw)]
    return (*same, widest)


def _agree(logits: object, want: np.ndarray, width: int, draw: np.random.Generator) -> bool:
    """Whether batches of ``width`` rows give the rows that they have in the widest."""
    places = draw.permutation(len(want))[:width]
    return bool(np.array_equal(logits(places), want[places]))  # type: ignore[operator]
