"""Tensors that are still unread, changed on the way: rows in another order, some rows, stacked, shifted.

Light: nothing is read, and mlx not loaded, before a result's ``read`` is called.
A packed weight stays packed, for its rows are those of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxlora_core.values import LazyTensor, PackedTensor

if TYPE_CHECKING:
    import mlx.core as mx


def neighbour_rows(heads: int, width: int, turned: int | None = None) -> list[int]:
    """Which row there each row of queries or keys here is, where libraries pair features of a head otherwise.

    Here rotary positions turn features 2i and 2i + 1 of a head against each other,
    there features i and i + half of those that are turned. So row 2i + s of a head
    is row i + s half there.

    Args:
        heads: that stand one above the other.
        width: rows of a head, E.
        turned: the first rows of a head that are turned, an even number; None for all.
    """
    half = (width if turned is None else turned) // 2
    one = [s * half + i for i in range(half) for s in (0, 1)] + list(range(2 * half, width))
    return [head * width + row for head in range(heads) for row in one]


def ordered_rows(tensor: LazyTensor, rows: Sequence[int]) -> LazyTensor:
    """The tensor with row ``rows[i]`` at place i.

    Args:
        tensor: (N, ...).
        rows: each from 0 to N - 1; as many as the result has.
    """

    def read(array: mx.array) -> mx.array:
        import mlx.core as mx

        return mx.take(array, mx.array(list(rows), mx.uint32), axis=0)

    return _changed(tensor, len(rows), read)


def some_rows(tensor: LazyTensor, start: int, count: int) -> LazyTensor:
    """Rows ``start`` to ``start + count - 1`` of a tensor (N, ...)."""
    return _changed(tensor, count, lambda array: array[start : start + count])


def restored_rows(tensor: LazyTensor, rows: Sequence[int]) -> LazyTensor:
    """The tensor with row ``i`` at place ``rows[i]``: what :func:`ordered_rows` takes back.

    Args:
        tensor: (N, ...).
        rows: each from 0 to N - 1, once.
    """
    places = [0] * len(rows)
    for here, there in enumerate(rows):
        places[there] = here
    return ordered_rows(tensor, places)


def stacked_rows(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors (N, ...) of one width as one, the first on top.

    It stays packed where all are packed alike. Dense tensors of several types become float32.
    """
    first, packed = tensors[0], [tensor.packed for tensor in tensors]
    count = sum(tensor.shape[0] for tensor in tensors)
    joined = None
    whole = [part for part in packed if part is not None]
    if len(whole) == len(packed) and all(_alike(whole[0], part) for part in whole):
        parts = {name: stacked_rows([part.parts[name] for part in whole]) for name in whole[0].parts}
        joined = replace(whole[0], parts=parts)
    dtype = first.dtype if len({tensor.dtype for tensor in tensors}) == 1 else "float32"

    def read() -> mx.array:
        import mlx.core as mx

        return mx.concatenate([tensor.read().astype(getattr(mx, dtype)) for tensor in tensors])

    return LazyTensor((count, *first.shape[1:]), dtype, read, joined)


def shifted(tensor: LazyTensor, amount: float) -> LazyTensor:
    """The tensor with ``amount`` added to each number, in float32; one that was packed is so no more."""

    def read() -> mx.array:
        import mlx.core as mx

        return tensor.read().astype(mx.float32) + amount

    return LazyTensor(tensor.shape, "float32", read)


def _alike(one: PackedTensor, other: PackedTensor) -> bool:
    """Whether two weights are packed in the same way, so that one may stand above the other."""
    types = [{name: part.dtype for name, part in weight.parts.items()} for weight in (one, other)]
    return one.quantizer == other.quantizer and one.options == other.options and types[0] == types[1]


def _changed(tensor: LazyTensor, count: int, change: Callable[[mx.array], mx.array]) -> LazyTensor:
    """The tensor, and what stands for it, after a change to its rows that leaves ``count`` of them."""
    packed = tensor.packed
    if packed is not None:
        parts = {name: _changed(part, count, change) for name, part in packed.parts.items()}
        packed = replace(packed, parts=parts)
    shape = (count, *tensor.shape[1:])
    return replace(tensor, shape=shape, read=lambda: change(tensor.read()), packed=packed)
