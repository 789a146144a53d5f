"""Packed rows: several rows one after the other in a single one, with none reaching into the next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Rows:
    """A mask: each token sees those of its own row up to itself.

    Attributes:
        lengths: tokens of each row; T of them all together.
        window: how many tokens a token sees, including itself; None is all before it in its row.
    """

    lengths: tuple[int, ...]
    window: int | None = None

    def __post_init__(self) -> None:
        if min(self.lengths, default=0) < 1:
            raise ValueError(f"each of the rows must have a token: {self.lengths}")


#: what attention takes: None, ``"causal"``, packed rows, or an array that broadcasts to (B, H, T, S)
Mask: TypeAlias = mx.array | Rows | str | None


def apart(x: mx.array, rows: Rows) -> mx.array:
    """Unpack (1, H, T, E) to (R, H, L, E), repeating the last token of shorter rows as padding.

    The padding gives no gradient, so the result must not depend on it.
    """
    return cast(mx.array, _apart(x, *_places(rows.lengths)))


def together(x: mx.array, rows: Rows) -> mx.array:
    """Pack (R, H, L, E) to (1, H, T, E), without the padding of shorter rows."""
    return cast(mx.array, _together(x, *_places(rows.lengths)))


@lru_cache(maxsize=8)
def _places(lengths: tuple[int, ...]) -> tuple[mx.array, mx.array, mx.array]:
    """Indices to unpack, whether each is a token and not padding, both (R, L), and indices to pack, (T,)."""
    count = np.array(lengths)[:, None]  # (R, 1)
    starts = np.cumsum(count)[:, None] - count
    place = np.arange(count.max())  # (L,)
    inside = place < count  # (R, L)
    at = starts + np.minimum(place, count - 1)
    return mx.array(at), mx.array(inside), mx.array(np.flatnonzero(inside))


def _taken_apart(x: mx.array, at: mx.array) -> mx.array:
    return x[0][:, at].swapaxes(0, 1)  # (R, H, L, E)


def _put_together(x: mx.array, back: mx.array) -> mx.array:
    return x.swapaxes(0, 1).flatten(1, 2)[:, back][None]  # (1, H, T, E)


# MLX's gradient of indexing is a scatter-add, which is slow; here each direction is the other's gradient.
@mx.custom_function
def _apart(x: mx.array, at: mx.array, inside: mx.array, back: mx.array) -> mx.array:
    return _taken_apart(x, at)


@_apart.vjp
def _apart_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    _, *places = primals
    return _put_together(cotangents, places[-1]), *map(mx.zeros_like, places)


@mx.custom_function
def _together(x: mx.array, at: mx.array, inside: mx.array, back: mx.array) -> mx.array:
    return _put_together(x, back)


@_together.vjp
def _together_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    _, at, inside, back = primals
    taken = _taken_apart(cotangents, at)
    dx = mx.where(inside[:, None, :, None], taken, mx.zeros((), taken.dtype))
    return dx, *map(mx.zeros_like, (at, inside, back))
