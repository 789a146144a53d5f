"""Whether the linears of a VeRA share their projections as PEFT's do."""

from __future__ import annotations

import mlx.core as mx

from mlxlora_core.api import ExportAdapter


def projections(adapter: ExportAdapter) -> tuple[mx.array, mx.array] | None:
    """The projections (R, inputs) and (outputs, R) of which each linear has the first columns and rows.

    Outputs are taken in the order of the library. None where the linears have projections of their
    own, so that only the product of each is left to be told; or where several are one there.
    """
    if adapter.heights.keys() & {place.foreign for place in adapter.places.values()}:
        return None
    first = second = None
    for path in adapter.paths:
        a = adapter.tensors[f"{path}.vera_a"].read().T
        b = adapter.tensors[f"{path}.vera_b"].read().T
        rows = adapter.places[path].rows
        if rows is not None:
            b = b[mx.argsort(mx.array(list(rows)))]
        first, second = _longer(first, a, 1), _longer(second, b, 0)
        if first is None or second is None:
            return None
    return None if first is None or second is None else (first, second)


def _longer(held: mx.array | None, other: mx.array, axis: int) -> mx.array | None:
    """The longer one of two along an axis, if the other is how it begins."""
    if held is None:
        return other
    long, short = (held, other) if held.shape[axis] >= other.shape[axis] else (other, held)
    begin = long[:, : short.shape[1]] if axis else long[: short.shape[0]]
    return long if mx.array_equal(begin, short).item() else None
