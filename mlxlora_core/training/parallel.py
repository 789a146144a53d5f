"""Computes a batch in parts, each on a core of its own.

MLX's CPU backend runs the operations of a stream on one thread; of those, only
a matrix product can use more, and only under a BLAS that has threads. So rows
of a batch are computed side by side where there are enough of them, each part
on a stream and a core of its own; where there are not, products get all cores.
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
    """``compute`` of each part that some rows are dealt into, evaluated, with the part.

    On a CPU the parts are computed at the same time; the number of cores and the
    lengths alone decide what they are, so that sums over them are the same in every
    run. On a GPU there is one part.

    Args:
        compute: gives arrays, or a tree of them, that add up over the rows of a batch.
        collate: makes the batch of a part; called for one after the other.
        rows: one at least.
        lengths: in tokens, of each of them.
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
    """Streams of the CPU, which MLX binds to the thread that uses them; each has a thread that never ends."""
    return [mx.new_thread_local_stream(mx.Device(mx.cpu)) for _ in range(count)]


# Share of a training step outside matrix products, on one core (docs/performance.md).
_ELEMENTWISE = 0.25


def split_rows(rows: Sequence[int], lengths: Sequence[int]) -> Sequence[Sequence[int]]:
    """``rows`` of a batch in parts to compute side by side; all of them in one where that is faster.

    Args:
        rows: one at least.
        lengths: in tokens, of each of them.
    """
    cores = thread_count()
    count = min(cores, len(rows))
    if count < 2:
        return [rows]
    apart = -(-len(rows) // count) / len(rows)
    together = (1 - _ELEMENTWISE) / cores + _ELEMENTWISE if products_have_threads() else 1.0
    return deal(rows, lengths, count) if apart < together else [rows]
