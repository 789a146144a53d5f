"""Whether products and exponentials, as they are now, agree with numpy and the C library in double precision.

The sizes of products through MLX are odd and reach each way that an OpenBLAS
has: tiny, small kernel, split among threads; with each operand plain and
transposed, in batches, cut out of larger arrays, and added to a third. Products
with a vector on either side are tried before MLX gets to them, by themselves.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxlora_core.api import LayerOperations, PackedProduct

Array = npt.NDArray[Any]

#: M, K, N of (M, K) @ (K, N)
_SIZES = ((1, 1, 1), (3, 1, 5), (7, 13, 3), (1, 67, 129), (65, 33, 1), (33, 0, 5), (131, 127, 97))

#: the same of products that may be made of bfloat16
_LARGE = ((32, 128, 32), (67, 161, 47))

# Rows and columns of what a vector is multiplied by. OpenBLAS's sgemv takes threads from 9,216 elements on,
# in newer versions from 460,800, and a side longer than 4,096 in parts. It is tried below and above all three
# because some of its kernels were inaccurate on x86-64: https://github.com/OpenMathLib/OpenBLAS/pull/4814
_VECTOR_SIZES = ((5, 3), (61, 150), (211, 307), (4099, 113), (113, 4099))

# From here on each product is tried one way and not four, for where others keep the processors busy, threads
# that wait for each other take 12 ms a product.
_THREADED = 460_800

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112
_INT, _FLOAT, _ADDRESS = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
_SGEMM = ctypes.CFUNCTYPE(
    *(None, _INT, _INT, _INT, _INT, _INT, _INT, _FLOAT),
    *(_ADDRESS, _INT, _ADDRESS, _INT, _FLOAT, _ADDRESS, _INT),
)


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
    return _wrong([*_plain(_SIZES), *_other()])


def large_faults(rounding: float) -> list[str]:
    """The large products that are off by more than their bound, in words.

    Args:
        rounding: what is added to the bound, as a share of the sum of absolute values.
    """
    return _wrong([*_plain(_LARGE, rounding)])


def _wrong(products: list[tuple[str, mx.array, Exact]]) -> list[str]:
    """What is said of those products that are wrong."""
    mx.eval([got for _, got, _ in products])
    return [what for what, got, exact in products if not exact.fits(np.array(got))]


def vector_faults(sgemm: int) -> list[str]:
    """The products of one row or one column that the ``cblas_sgemm`` at an address gets wrong, in words."""
    wrong = []
    for rows, columns in _VECTOR_SIZES:
        stored = np.resize(_numbers(8191), (rows, columns + 3))[:, :columns]
        for matrix in (stored, stored.T):
            tried = _with_vectors(_SGEMM(sgemm), matrix)
            wrong += [what for what, got, exact in tried if not exact.fits(got)]
    return wrong


def exponential_works(exp: Callable[[mx.array], mx.array]) -> bool:
    """Whether ``exp`` agrees with the C library in double precision."""
    numbers = np.concatenate(
        [np.linspace(-110, 88, 4099), [0.0, -0.0, -np.inf, -1e30, 1e-30]], dtype=np.float32
    )
    exact = np.array([math.exp(x) for x in numbers])
    for count in (1, 7, 8, 9, 65, numbers.size):
        got = np.array(exp(mx.array(numbers[-count:])))
        if not np.allclose(got, exact[-count:], rtol=4e-7, atol=1e-38):
            return False
    return True


def exponentials_work(exp_rows: Callable[[mx.array, int], mx.array]) -> bool:
    """Whether it agrees with numpy in double precision."""
    x = 20 * _numbers(3, 4, 37)
    wide = x.astype(np.float64)
    seen = np.arange(33, 37)[:, None] >= np.arange(37)
    for queries, row in ((0, wide), (4, np.where(seen, wide, -np.inf))):
        exact = np.exp(row - row.max(-1, keepdims=True))
        if not np.allclose(np.array(exp_rows(mx.array(x), queries)), exact, rtol=4e-6, atol=1e-38):
            return False
    return True


def rows_work(
    log_softmax: Callable[[mx.array], mx.array], scaled_exp: Callable[[mx.array, mx.array], mx.array]
) -> bool:
    """Whether both agree with numpy in double precision, and leave what others hold as it is."""
    x, factors = 20 * _numbers(3, 1037), _numbers(3, 1)
    given, wide = mx.array(x), x.astype(np.float64)
    highest = wide.max(-1, keepdims=True)
    exact = wide - highest - np.log(np.exp(wide - highest).sum(-1, keepdims=True))
    got = log_softmax(given)
    powers = scaled_exp(got, mx.array(factors))
    return (
        np.allclose(np.array(got), exact, rtol=4e-6, atol=4e-6)
        and np.allclose(np.array(powers), factors * np.exp(exact), rtol=1e-4, atol=1e-38)
        and np.array_equal(np.array(given), x)
    )


def layers_work(layers: LayerOperations) -> bool:
    """Whether each agrees with numpy in double precision, and leaves what others hold as it is."""
    eps, given = 1e-3, (_numbers(3, 4, 38), _numbers(4, 3, 38).reshape(3, 4, 38))
    x, y = (mx.array(numbers) for numbers in given)
    wide, dy = (numbers.astype(np.float64) for numbers in given)
    sigmoid = 1 / (1 + np.exp(-wide))
    factor = 1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps)
    pull = (wide * dy).mean(-1, keepdims=True) * factor**2
    powers = np.exp(wide)
    shares = powers / powers.sum(-1, keepdims=True)
    table = _numbers(2, 4, 38).astype(np.float64)
    beside = wide.reshape(3, 4, 19, 2)[..., ::-1].reshape(3, 4, 38)
    tries = (
        (layers.silu_times(x, y), wide * sigmoid * dy),
        (layers.silu_slope(x, y), sigmoid * (1 + wide * (1 - sigmoid)) * dy),
        (layers.normalise(x, eps), wide * factor),
        (layers.normalise_back(x, y, eps), (dy - wide * pull) * factor),
        (layers.rotation(*map(mx.array, _numbers(2, 4, 38)))(x), wide * table[0] + beside * table[1]),
        (
            layers.softmax_back(mx.array(powers.astype(np.float32)), y),
            powers * (dy - (shares * dy).sum(-1, keepdims=True)),
        ),
    )
    right = all(np.allclose(np.array(got), exact, rtol=1e-5, atol=1e-6) for got, exact in tries)
    return right and all(
        np.array_equal(np.array(kept), numbers) for kept, numbers in zip((x, y), given, strict=True)
    )


def packed_works(make: Callable[..., PackedProduct | None]) -> bool:
    """Whether products with packed weights are those with what the words, scales and biases stand for."""
    words = mx.array((_numbers(40, 12) * 2**31).astype(np.int64).astype(np.uint32))
    scales, biases = _numbers(40, 3), _numbers(3, 40).T
    product = make(words, mx.array(scales), mx.array(biases), group_size=32, bits=4)
    if product is None or product.times_back is None:
        return False
    values = (np.array(words)[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    scaled = values.reshape(40, 3, 32).astype(np.float64) * scales[..., None]
    weight = (scaled + biases[..., None]).reshape(40, 96)
    size = (np.abs(scaled) + np.abs(biases)[..., None]).reshape(40, 96)
    works = True
    for rows in (2, 40):  # few and many
        for multiply, right, most in (
            (product.times, weight.T, size.T),
            (product.times_back, weight, size),
        ):
            x = _numbers(rows, len(right))
            bound = 2.0**-23 * 100 * _product(np.abs(x), most)
            exact = Exact(_product(x.astype(np.float64), right), bound)
            works = works and exact.fits(np.array(multiply(mx.array(x))))
    return works


def _plain(
    sizes: Iterable[tuple[int, int, int]], rounding: float = 0.0
) -> Iterator[tuple[str, mx.array, Exact]]:
    """Each size, with each operand as it is and as the transpose of its transpose."""
    for m, k, n in sizes:
        a, b = _numbers(m, k), _numbers(k, n)
        exact = _exact(a, b)
        exact = Exact(exact.value, exact.bound + rounding * _product(np.abs(a), np.abs(b)))
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


def _with_vectors(sgemm: Callable[..., None], matrix: Array) -> Iterator[tuple[str, Array, Exact]]:
    """``alpha matrix @ x + beta y`` as a product with one column and, all transposed, with one row."""
    m, k = matrix.shape
    alpha, beta = np.array([1.0, -0.5]), np.array([0.0, 2.0])
    x, y = _numbers(k, 1), _numbers(m, 2)
    exact = _exact(matrix, x, y, alpha, beta)  # (M, 2)
    ways = [("column" if m > k else "row", 1)]
    if matrix.size < _THREADED:
        ways = [("column", 0), ("column", 1), ("row", 0), ("row", 1)]
    for form, i in ways:
        if form == "column":
            got = y.copy()[:, i : i + 1]
            _multiply(sgemm, matrix, x, got, alpha[i], beta[i])
        else:
            got = y.T.copy()[i : i + 1].T
            _multiply(sgemm, x.T, matrix.T, got.T, alpha[i], beta[i])
        what = f"one {form} for ({m}, {k}), strides {matrix.strides}, beta {beta[i]}"
        yield what, got, Exact(exact.value[:, i : i + 1], exact.bound[:, i : i + 1])


def _multiply(sgemm: Callable[..., None], a: Array, b: Array, c: Array, alpha: float, beta: float) -> None:
    """``c = alpha a @ b + beta c`` of float32 by a ``cblas_sgemm``."""
    (trans_a, lda), (trans_b, ldb), (_, ldc) = _layout(a), _layout(b), _layout(c)
    sgemm(
        *(_ROW_MAJOR, trans_a, trans_b, *c.shape, a.shape[1], alpha),
        *(a.ctypes.data, lda, b.ctypes.data, ldb, beta, c.ctypes.data, ldc),
    )


def _layout(matrix: Array) -> tuple[int, int]:
    """How a float32 matrix is stored, as it is or transposed, and the step between its rows or columns."""
    down, along = (step // 4 for step in matrix.strides)
    if along == 1:
        return _PLAIN, max(down, matrix.shape[1])
    return _TRANSPOSED, max(along, matrix.shape[0])


def _exact(
    a: Array, b: Array, c: Array | float = 0.0, alpha: Array | float = 1.0, beta: Array | float = 1.0
) -> Exact:
    """``alpha a @ b + beta c`` by numpy, where alpha and beta may differ from column to column.

    Whatever the order of summation, rounding puts an entry off by at most
    (K + 4) eps times the same sum of absolute values. Source: N. J. Higham,
    Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.5.
    """
    wide = np.result_type(a.dtype, np.float64)
    value = alpha * _product(a.astype(wide), b.astype(wide)) + beta * c
    size = np.abs(alpha) * _product(np.abs(a), np.abs(b)) + np.abs(beta * c)
    terms = a.shape[-1] + 4
    return Exact(value, terms * float(np.finfo(a.dtype).eps) * size)


def _product(a: Array, b: Array) -> Array:
    """``a @ b`` without the BLAS of numpy, whose threads would stand in the way of those that are checked."""
    product: Array = np.einsum("...mk,...kn->...mn", a, b)
    return product


def _numbers(*shape: int) -> Array:
    """Numbers between -1 and 1 without a pattern, float32, the same on every run."""
    angles = 2.399963 * np.arange(1, math.prod(shape) + 1) ** 1.5  # no two rows or columns alike
    numbers: Array = np.sin(angles).astype(np.float32).reshape(shape)
    return numbers
