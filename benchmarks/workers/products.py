"""Timing of matrix products, the same in every tool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

SECONDS = 0.3


def product_samples(multiply: Callable[[], object]) -> Iterator[float]:
    """Seconds of one product, as the mean over those that fit into a third of a second."""
    multiply()
    while True:
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            multiply()
            count += 1
        yield (time.perf_counter() - began) / count
