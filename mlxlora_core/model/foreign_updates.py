"""The updates of an adapter by the modules of another library, which may be one for several linears here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlxlora_core.values import ExportAdapter, ForeignTensor, LowRank


def updates_there(adapter: ExportAdapter, updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Module path there -> its update, its outputs in the order that they have there.

    Several linears here that are one there have the sum of their ranks: each update is on its own
    outputs, and outputs without one have none. Where all begin with the same factor, as they do
    when they were one before, it is there once.

    Args:
        adapter: with the places of its linears.
        updates: path of a linear here -> its update.
    """
    return {path: _joined(adapter, names, updates) for path, names in _modules(adapter, updates).items()}


def vectors_there(
    adapter: ExportAdapter, vectors: Mapping[str, mx.array], missing: float
) -> dict[str, mx.array]:
    """Module path there -> a number for each of its outputs, in the order that they have there.

    Args:
        adapter: with the places of its linears.
        vectors: path of a linear here -> a number for each of its outputs.
        missing: the number of outputs there that no linear with a vector has.
    """
    found = {}
    for path, names in _modules(adapter, vectors).items():
        height = _height(adapter, names[0], vectors[names[0]].shape[0])
        rows = mx.full((height,), missing)
        for name in names:
            rows[mx.array(_rows(adapter.places[name], vectors[name].shape[0]))] = vectors[name]
        found[path] = rows
    return found


def _modules(adapter: ExportAdapter, named: Mapping[str, object]) -> dict[str, list[str]]:
    """Module path there -> paths here, in the order of their outputs there."""
    found: dict[str, list[str]] = {}
    for path in sorted(named, key=lambda path: adapter.places[path].start or 0):
        found.setdefault(adapter.places[path].foreign.removesuffix(".weight"), []).append(path)
    return dict(sorted(found.items()))


def _joined(adapter: ExportAdapter, names: Sequence[str], updates: Mapping[str, LowRank]) -> LowRank:
    """The update of a module that is these linears here."""
    parts = [updates[name] for name in names]
    first = parts[0]
    alike = all(part.scale == first.scale and mx.array_equal(part.a, first.a).item() for part in parts)
    ranks = [0 if alike and part is not first else part.a.shape[1] for part in parts]
    height = _height(adapter, names[0], first.b.shape[1])
    b = mx.zeros((sum(ranks), height))
    start = 0
    for name, part, rank in zip(names, parts, ranks, strict=True):
        columns = mx.array(_rows(adapter.places[name], part.b.shape[1]))
        lines = slice(0, ranks[0]) if alike else slice(start, start + rank)
        factor = 1.0 if part.scale == first.scale else part.scale / first.scale
        b[lines, columns] = part.b.astype(mx.float32) * factor
        start += rank
    a = first.a if alike else mx.concatenate([part.a for part in parts], axis=1)
    return LowRank(a, b, first.scale)


def _height(adapter: ExportAdapter, name: str, outputs: int) -> int:
    """How many outputs the module there has that a linear here is, or is a part of."""
    place = adapter.places[name]
    return outputs if place.start is None else adapter.heights[place.foreign]


def _rows(place: ForeignTensor, outputs: int) -> list[int]:
    """For each output here which one it is there."""
    start = place.start or 0
    # An embedding's update goes along its width, which no library orders otherwise.
    rows = range(outputs) if place.rows is None or len(place.rows) != outputs else place.rows
    return [start + row for row in rows]
