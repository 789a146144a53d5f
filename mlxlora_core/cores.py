"""The cores of the CPU that this process may keep busy, and how work is dealt out to them.

MLX's CPU backend runs the operations of a stream on one thread; of those, only
a matrix product can use more, and only under a BLAS that has threads. So rows
of a batch are computed side by side where there are enough of them, each part
on a stream and a core of its own; where there are not, products get all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mlxlora_core.limits import thread_count

# Share of a training step outside matrix products, on one core (docs/performance.md).
_ELEMENTWISE = 0.25

# Each sets how many threads a matrix product takes, as the runtimes gave them.
_setters: list[Callable[[int], None]] = []


def use_for_products(set_threads: Callable[[int], None]) -> None:
    """Let ``set_threads`` say how many threads a matrix product takes, from now on."""
    _setters.append(set_threads)


@contextmanager
def product_threads(count: int) -> Iterator[None]:
    """Inside, a matrix product takes ``count`` threads, where a runtime can set that; then all cores."""
    for set_threads in _setters:
        set_threads(count)
    try:
        yield
    finally:
        for set_threads in _setters:
            set_threads(thread_count())


def deal(rows: Sequence[int]) -> list[Sequence[int]]:
    """``rows`` of a batch in parts to compute side by side; all of them in one where that is faster.

    A part takes every n-th row, so that rows in order of length make parts of like work.
    """
    cores = thread_count()
    count = min(cores, len(rows))
    if count < 2:
        return [rows]
    apart = -(-len(rows) // count) / len(rows)
    together = (1 - _ELEMENTWISE) / cores + _ELEMENTWISE if _setters else 1.0
    return [rows[i::count] for i in range(count)] if apart < together else [rows]
