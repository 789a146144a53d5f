"""What the rows of a step draw by, each for itself: a function of (seed, step, row, place in the row)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.training.batches import Batch


def step_key() -> int:
    """What ``mx.random`` was seeded with last; where something was drawn since, another number."""
    state: Any = mx.random.state
    words = np.array(state[0])
    return int(words[0]) << 32 | int(words[1])


def places_of(key: int, rows: Sequence[int], batch: Batch) -> mx.array:
    """Two words for each place in a batch's inputs, (B, T, 2) uint32.

    Places of padding have some too. Source: Philox (Salmon et al. 2011) for the first place of a row.

    Args:
        key: of the step, below 2^64; all rows of a step have the same.
        rows: of the batch, by their numbers among all; further ones that fill a shape are its first again.
        batch: made of them.
    """
    height, width = batch.inputs.shape
    firsts = [np.random.Philox(key=np.array([key, row], np.uint64)).random_raw() for row in rows]
    if batch.lengths is None:
        firsts += firsts[:1] * (height - len(rows))
        words: Any = np.array(firsts, np.uint64)[:, None] + np.arange(width, dtype=np.uint64)  # (B, T)
    else:
        within = np.concatenate([np.arange(length, dtype=np.uint64) for length in batch.lengths])
        words = np.repeat(np.array(firsts, np.uint64), batch.lengths) + within  # (T,)
    return mx.array(words.reshape(height, width, 1).view(np.uint32))
