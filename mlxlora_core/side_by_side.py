"""A batch in parts, each on a core of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import mlx.core as mx

from mlxlora_core.cores import deal, product_threads
from mlxlora_core.data import Batch, Example, make_batch
from mlxlora_core.layers import on_cpu

T = TypeVar("T")


def side_by_side(
    compute: Callable[[Batch], T], examples: Sequence[Example], rows: Sequence[int]
) -> list[tuple[Batch, T]]:
    """``compute`` of each part that some rows are dealt into, evaluated, with the part.

    On a CPU the parts are computed at the same time; the number of cores alone
    decides what they are, so that sums over them are the same in every run. On
    a GPU there is one part.

    Args:
        compute: gives arrays, or a tree of them, that add up over the rows of a batch.
        examples: of which these are rows.
        rows: one at least.
    """
    parts = deal(rows) if on_cpu() else [rows]
    if len(parts) == 1:
        batch = make_batch(examples, rows)
        result = compute(batch)
        mx.eval(result)
        return [(batch, result)]
    results = []
    for part, stream in zip(parts, _streams(len(parts)), strict=True):
        batch = make_batch(examples, part)
        with mx.stream(stream):
            results.append((batch, compute(batch)))
    with product_threads(1):
        mx.eval([result for _, result in results])
    return results


@cache
def _streams(count: int) -> list[mx.Stream]:
    """Streams of the CPU; each has a thread that never ends."""
    return [mx.new_stream(mx.Device(mx.cpu)) for _ in range(count)]
