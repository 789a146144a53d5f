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
        window: tokens that a token sees, itself included; None is all before it in its row.
    """

    lengths: tuple[int, ...]
    window: int | None = None

    def __post_init__(self) -> None:
        if min(self.lengths, default=0) < 1:
            raise ValueError(f"each of the rows must have a token: {self.lengths}")


#: what attention takes: nothing, ``"causal"``, rows, or an array that broadcasts to (B, H, T, S)
Mask: TypeAlias = mx.array | Rows | str | None


def apart(x: mx.array, rows: Rows) -> mx.array:
    """(1, H, T, E) as (R, H, L, E): each row by itself, the last token of shorter ones again at their ends.

    Nothing may come of the ends: they give no gradient.
    """
    return cast(mx.array, _apart(x, *_places(rows.lengths)))


def together(x: mx.array, rows: Rows) -> mx.array:
    """(R, H, L, E) as (1, H, T, E): the rows one after the other, without the ends of shorter ones."""
    return cast(mx.array, _together(x, *_places(rows.lengths)))


@lru_cache(maxsize=8)
def _places(lengths: tuple[int, ...]) -> tuple[mx.array, mx.array, mx.array]:
    """Where tokens of rows apart stand together (R, L), whether they are no ends, and the way back (T,)."""
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


# MLX's gradient of a choice is a sum at chosen places, which is slow; here each way is the other's gradient.
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
