"""Dropout by row: what a row drops is its own, whatever it is computed beside and by whom.

A number is kept or dropped by the row that it belongs to, by its place in that row, by the module
that asks and by which feature it is. So padding, packing, parts of a batch that are computed side by
side, accumulation and other processes change nothing in what is dropped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# What each place of a batch draws by, in the layout of its inputs: two words, (..., 2) uint32.
_places: ContextVar[mx.array | None] = ContextVar("places", default=None)

# A share is told in 65536ths: two numbers for a word drawn, and a mean that is exact all the same.
_PARTS = 1 << 16


class Dropout(nn.Module):
    """Numbers become 0 with a probability while training, the others grow so that the mean stays.

    In a training of mlxlora each row of a batch draws by itself; elsewhere, and where the
    inputs do not show which place of a row they are of, all of them are drawn by ``mx.random``.
    Source: Srivastava et al. 2014, JMLR 15, section 10, with the factor in training.

    Args:
        p: how probable; rounded to 65536ths, but not to 0 or 1.

    Raises:
        ValueError: p is not from 0 up to, not including, 1.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # MLX's modules are not annotated
        if not 0 <= p < 1:
            raise ValueError(f"the probability of dropout is {p}, wanted 0 up to, not including, 1")
        self.p = p
        self._dropped = min(max(round(p * _PARTS), 1), _PARTS - 1) if p else 0
        self._name = 0

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, ..., D) -> the same shape; as it is outside of training."""
        if not self.training or not self._dropped:
            return x
        keep = self._drawn(x) >= mx.array(self._dropped, mx.uint16)
        return keep * mx.array(_PARTS / (_PARTS - self._dropped), x.dtype) * x

    def _drawn(self, x: mx.array) -> mx.array:
        """Numbers below 65536, uint16 in the shape of ``x``."""
        places = _places.get()
        each = 0 if places is None else _numbers_a_place(x, places)
        if not each or places is None:
            return mx.random.randint(0, _PARTS, x.shape, mx.uint32).astype(mx.uint16)
        words = places.reshape(-1, 2) ^ mx.array([self._name >> 32, self._name & 0xFFFFFFFF], mx.uint32)
        # Keys that are split are nothing but words of the generator, which MLX has no other name for.
        split: Any = mx.vmap(partial(mx.random.split, num=-(-each // 4)))
        drawn: mx.array = split(words).reshape(len(words), -1).view(mx.uint16)
        return drawn[:, :each].reshape(x.shape)

    def _extra_repr(self) -> str:
        return f"p={self.p}"


def _numbers_a_place(x: mx.array, places: mx.array) -> int:
    """How many numbers of ``x`` each place has, where its first axes are the places in order; else 0."""
    count = places.size // 2
    starts = (math.prod(x.shape[:axes]) for axes in range(1, x.ndim))
    return x.size // count if count in starts else 0


def drops(module: nn.Module) -> bool:
    """Whether any :class:`Dropout` in ``module`` drops something while it is trained."""
    return any(isinstance(child, Dropout) and child._dropped for child in module.modules())


def name_dropouts(module: nn.Module) -> None:
    """Tell each :class:`Dropout` in ``module`` its path, by which it draws."""
    for path, child in module.named_modules():
        if isinstance(child, Dropout):
            child._name = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")


@contextmanager
def drawn_by(places: mx.array | None) -> Iterator[None]:
    """Inside, rows draw by ``places``: two words for each place of a batch, (B, T, 2) uint32; None is not."""
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


@contextmanager
def at_places(chosen: mx.array | slice) -> Iterator[None]:
    """Inside, what is computed is of some of the places only, counted through all rows."""
    places = _places.get()
    with drawn_by(None if places is None else places.reshape(-1, 2)[chosen]):
        yield


def as_here(compute: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """``compute``, in which rows draw by what they draw by here, whenever it is called."""
    places = _places.get()

    def run(*arguments: Any) -> mx.array:
        with drawn_by(places):
            return compute(*arguments)

    return run
