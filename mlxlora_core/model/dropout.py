"""Dropout by row: what a row drops does not depend on the batch or the process that computes it.

Whether a number is dropped is decided by its row, its position in the row, the module and the feature.
Padding, packing, splitting a batch over cores, gradient accumulation and ranks therefore change nothing.
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

# A random key for each position of the batch, in the layout of its inputs: two words, (..., 2) uint32.
_keys: ContextVar[mx.array | None] = ContextVar("dropout keys", default=None)

# Probabilities are multiples of 1/65536: a drawn word then decides two numbers, and the mean is still exact.
_PARTS = 1 << 16


class Dropout(nn.Module):
    """In training, set numbers to 0 with probability p and scale up the others to keep the mean.

    In a training of mlxlora each row has random numbers of its own. Elsewhere, and where the shape
    of the inputs does not tell which position they belong to, ``mx.random`` draws them.
    Source: Srivastava et al. 2014, JMLR 15, section 10, with the factor in training.

    Args:
        p: the probability, rounded to a multiple of 1/65536, but never to 0 or 1.

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
        """(B, T, ..., D) -> the same shape; unchanged outside of training."""
        if not self.training or not self._dropped:
            return x
        keep = self._drawn(x) >= mx.array(self._dropped, mx.uint16)
        return keep * mx.array(_PARTS / (_PARTS - self._dropped), x.dtype) * x

    def _drawn(self, x: mx.array) -> mx.array:
        """Random integers below 65536, uint16 in the shape of ``x``."""
        keys = _keys.get()
        each = 0 if keys is None else _numbers_a_position(x, keys)
        if not each or keys is None:
            return mx.random.randint(0, _PARTS, x.shape, mx.uint32).astype(mx.uint16)
        words = keys.reshape(-1, 2) ^ mx.array([self._name >> 32, self._name & 0xFFFFFFFF], mx.uint32)
        # MLX has no function that gives the raw words of its generator, but splitting a key does.
        split: Any = mx.vmap(partial(mx.random.split, num=-(-each // 4)))
        drawn: mx.array = split(words).reshape(len(words), -1).view(mx.uint16)
        return drawn[:, :each].reshape(x.shape)

    def _extra_repr(self) -> str:
        return f"p={self.p}"


def _numbers_a_position(x: mx.array, keys: mx.array) -> int:
    """How many numbers of ``x`` belong to each position if its first axes are the positions; else 0."""
    count = keys.size // 2
    starts = (math.prod(x.shape[:axes]) for axes in range(1, x.ndim))
    return x.size // count if count in starts else 0


def drops(module: nn.Module) -> bool:
    """Whether ``module`` contains a :class:`Dropout` with p above 0."""
    return any(isinstance(child, Dropout) and child._dropped for child in module.modules())


def name_dropouts(module: nn.Module) -> None:
    """Tell each :class:`Dropout` in ``module`` its path, so that no two of them draw the same numbers."""
    for path, child in module.named_modules():
        if isinstance(child, Dropout):
            child._name = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")


@contextmanager
def using_keys(keys: mx.array | None) -> Iterator[None]:
    """Use a key for each position of a batch, (B, T, 2) uint32; None leaves drawing to ``mx.random``."""
    token = _keys.set(keys)
    try:
        yield
    finally:
        _keys.reset(token)


@contextmanager
def at_positions(chosen: mx.array | slice) -> Iterator[None]:
    """Use the keys of some positions only; ``chosen`` indexes the positions of all rows, flattened."""
    keys = _keys.get()
    with using_keys(None if keys is None else keys.reshape(-1, 2)[chosen]):
        yield


def with_current_keys(compute: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """``compute`` with the keys that are in use now, even if it is called later."""
    keys = _keys.get()

    def run(*arguments: Any) -> mx.array:
        with using_keys(keys):
            return compute(*arguments)

    return run
