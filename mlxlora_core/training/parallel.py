"""Computes a batch in parts, each on a core of its own.

MLX's CPU backend runs the operations of a stream on one thread. Only matrix products can use more,
and only with a BLAS that has threads. So if a batch has enough rows, parts of it are computed side
by side, each on its own stream and core; otherwise products get all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import mlx.core as mx

from mlxlora_core.machine.device import on_cpu, product_threads, products_have_threads
from mlxlora_core.machine.processors import thread_count
from mlxlora_core.training.batches import Batch
from mlxlora_core.training.dealing import deal

T = TypeVar("T")


def side_by_side(
    compute: Callable[[Batch], T],
    collate: Callable[[Sequence[int]], Batch],
    rows: Sequence[int],
    lengths: Sequence[int],
) -> list[tuple[Batch, T]]:
    """Split rows into parts and compute each; returns (part, result) pairs, evaluated.

    On a CPU the parts are computed at the same time. Only the number of cores and the lengths decide
    how rows are split, so that sums over the parts are the same in every run. On a GPU there is one part.

    Args:
        compute: returns arrays, or a tree of them, that are sums over the rows of a batch.
        collate: makes the batch of a part; called for one part after the other.
        rows: at least one.
        lengths: of each row, in tokens.
    """
    parts = split_rows(rows, lengths) if on_cpu() else [rows]
    if len(parts) == 1:
        batch = collate(rows)
        result = compute(batch)
        mx.eval(result)
        return [(batch, result)]
    results = []
    for part, stream in zip(parts, _streams(len(parts)), strict=True):
        batch = collate(part)
        with mx.stream(stream):
            results.append((batch, compute(batch)))
    with product_threads(1):
        mx.eval([result for _, result in results])
    return results


@cache
def _streams(count: int) -> list[mx.ThreadLocalStream]:
    """CPU streams; cached because MLX binds one to the calling thread and its own thread never ends."""
    return [mx.new_thread_local_stream(mx.Device(mx.cpu)) for _ in range(count)]


# Share of a training step outside matrix products, on one core (docs/performance.md).
_ELEMENTWISE = 0.25


def split_rows(rows: Sequence[int], lengths: Sequence[int]) -> Sequence[Sequence[int]]:
    """The parts of a batch to compute side by side; a single part if that is faster.

    Args:
        rows: at least one.
        lengths: of each row, in tokens.
    """
    cores = thread_count()
    count = min(cores, len(rows))
    if count < 2:
        return [rows]
    apart = -(-len(rows) // count) / len(rows)
    together = (1 - _ELEMENTWISE) / cores + _ELEMENTWISE if products_have_threads() else 1.0
    return deal(rows, lengths, count) if apart < together else [rows]
