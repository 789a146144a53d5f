"""Whether MLX's matrix products, as they are now, agree with numpy in double precision.

The sizes are odd and reach each way that an OpenBLAS has: tiny, small kernel,
split among threads, a vector on either side; with each operand plain and
transposed, in batches, cut out of larger arrays, and added to a third.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: M, K, N of (M, K) @ (K, N)
_SIZES = ((1, 1, 1), (3, 1, 5), (7, 13, 3), (1, 67, 129), (65, 33, 1), (33, 0, 5), (131, 127, 97))


@dataclass(frozen=True)
class Exact:
    """What a product should be.

    Attributes:
        value: in double precision.
        bound: how far each entry of a right result may be off.
    """

    value: Array
    bound: Array

    def fits(self, got: Array) -> bool:
        """Whether ``got`` is this product; NaN never is."""
        near = np.abs(got - self.value) <= self.bound if got.shape == self.value.shape else False
        return bool(np.all(near))


def faults() -> list[str]:
    """The products that are wrong, in words; none when all of them are right."""
    products = [*_plain(), *_other()]
    mx.eval([got for _, got, _ in products])
    return [what for what, got, exact in products if not exact.fits(np.array(got))]


def _plain() -> Iterator[tuple[str, mx.array, Exact]]:
    """Each size, with each operand as it is and as the transpose of its transpose."""
    for m, k, n in _SIZES:
        a, b = _numbers(m, k), _numbers(k, n)
        exact = _exact(a, b)
        for left, x in (("a", mx.array(a)), ("a.T", mx.array(a.T.copy()).T)):
            for right, y in (("b", mx.array(b)), ("b.T", mx.array(b.T.copy()).T)):
                yield f"{left} @ {right} for ({m}, {k}) and ({k}, {n})", x @ y, exact


def _other() -> Iterator[tuple[str, mx.array, Exact]]:
    """Other types, batches, views that are not contiguous, and products that are added to something."""
    a, b, c = _numbers(17, 31), _numbers(31, 9), _numbers(17, 9)
    wide = mx.array(a).astype(mx.float64) @ mx.array(b).astype(mx.float64)
    yield "float64", wide, _exact(a.astype(np.float64), b.astype(np.float64))
    u, v = a + 1j * a[::-1], b - 1j * b[:, ::-1]
    yield "complex64", mx.array(u) @ mx.array(v), _exact(u, v)
    added = mx.addmm(mx.array(c), mx.array(a), mx.array(b), alpha=0.5, beta=-2.0)
    yield "0.5 a @ b - 2 c", added, _exact(a, b, c, alpha=0.5, beta=-2.0)
    added = mx.addmm(mx.array(c[0]), mx.array(a), mx.array(b))
    yield "a @ b + row", added, _exact(a, b, c[0])
    cut = mx.array(a)[::2, 3:] @ mx.array(b)[3:, 1:8]
    yield "cut out", cut, _exact(a[::2, 3:], b[3:, 1:8])
    cut = mx.array(b)[3:, ::2].T @ mx.array(a)[1:14, 3:].T
    yield "cut out and transposed", cut, _exact(b[3:, ::2].T, a[1:14, 3:].T)
    cut = mx.array(a)[:, 3:4].T @ mx.array(c)[:, 1:8]
    yield "a column cut out as the row", cut, _exact(a[:, 3:4].T, c[:, 1:8])
    cut = mx.array(b)[3:, 1:8].T @ mx.array(b)[3:, 8:]
    yield "a column cut out as the column", cut, _exact(b[3:, 1:8].T, b[3:, 8:])
    added = mx.addmm(mx.array(c[:1]), mx.array(a[:1]), mx.array(b), alpha=0.5, beta=-2.0)
    yield "0.5 row @ b - 2 c", added, _exact(a[:1], b, c[:1], alpha=0.5, beta=-2.0)
    p, q = _numbers(3, 2, 19, 23), _numbers(3, 2, 11, 23)
    yield "batch", mx.array(p) @ mx.array(q).swapaxes(-1, -2), _exact(p, q.swapaxes(-1, -2))
    p = p.swapaxes(0, 2)
    yield "shared batch", mx.array(p) @ mx.array(q[0, 0]).T, _exact(p, q[0, 0].T)


def _exact(a: Array, b: Array, c: Array | float = 0.0, alpha: float = 1.0, beta: float = 1.0) -> Exact:
    """``alpha a @ b + beta c`` by numpy.

    Whatever the order of summation, rounding puts an entry off by at most
    (K + 4) eps times the same sum of absolute values. Source: N. J. Higham,
    Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.5.
    """
    wide = np.result_type(a.dtype, np.float64)
    value = alpha * (a.astype(wide) @ b.astype(wide)) + beta * c
    size = abs(alpha) * (np.abs(a).astype(np.float64) @ np.abs(b)) + np.abs(beta * c)
    terms = a.shape[-1] + 4
    return Exact(value, terms * float(np.finfo(a.dtype).eps) * size)


def _numbers(*shape: int) -> Array:
    """Numbers between -1 and 1 without a pattern, float32, the same on every run."""
    angles = 2.399963 * np.arange(1, math.prod(shape) + 1) ** 1.5  # no two rows or columns alike
    numbers: Array = np.sin(angles).astype(np.float32).reshape(shape)
    return numbers
