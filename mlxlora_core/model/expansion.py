"""Products with a weight that is stored in fewer bytes than it computes in and expanded each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

from mlxlora_core.machine.device import compute_dtype

# Weights that were expanded, by what expands them; None where each product expands its own.
_expanded: ContextVar[dict[Callable[[], mx.array], mx.array] | None] = ContextVar("expanded", default=None)


@contextmanager
def expanded_once() -> Iterator[None]:
    """Inside, a weight is expanded for the first product with it and kept for those that follow."""
    token = _expanded.set({})
    try:
        yield
    finally:
        _expanded.reset(token)


def times_expanded(x: mx.array, expand: Callable[[], mx.array], indices: mx.array | None = None) -> mx.array:
    """``x`` times the weight that ``expand`` gives, or those of its weights that ``indices`` choose."""
    held = _expanded.get()

    def product(x: mx.array) -> mx.array:
        weight = expand().astype(compute_dtype(x.dtype)) if held is None else held[expand]
        return x @ weight.T if indices is None else times_chosen(x, weight, indices)

    if held is not None:
        if expand not in held:
            held[expand] = expand().astype(compute_dtype(x.dtype))
        return product(x)
    # Expanded again for the gradient: kept from the forward pass, the
    # weights of all layers would stand in memory unpacked at once.
    y: mx.array = mx.checkpoint(product)(x)
    return y


def times_chosen(x: mx.array, weight: mx.array, indices: mx.array) -> mx.array:
    """Each row (..., inputs) times the one of the weights (experts, outputs, inputs) that it takes."""
    rows = x[..., None, :]  # (..., 1, inputs)
    products = mx.gather_mm(rows, weight.swapaxes(-1, -2), rhs_indices=indices)  # (..., 1, outputs)
    return products.squeeze(-2)
