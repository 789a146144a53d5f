"""Random keys for the dropout of a batch: a function of (seed, step, row, position in the row)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.training.batches import Batch


def step_key() -> int:
    """The number that ``mx.random`` was last seeded with; another one if anything was drawn since."""
    state: Any = mx.random.state
    words = np.array(state[0])
    return int(words[0]) << 32 | int(words[1])


def dropout_keys(key: int, rows: Sequence[int], batch: Batch) -> mx.array:
    """A key for each position in a batch's inputs, padding included, (B, T, 2) uint32.

    Philox (Salmon et al. 2011) gives 64 bits for the first position of a row; they grow by 1 a position.

    Args:
        key: of the step, below 2^64.
        rows: the rows of the batch, by number. Rows that only fill a shape repeat the first.
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
