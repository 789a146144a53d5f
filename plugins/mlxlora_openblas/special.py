"""The Python side of special.c: products with matrices that stand for other operations.

They work only while MLX calls the ``cblas_sgemm`` of sgemm.c. None of them has a gradient: asking for
one gives NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlxlora_core.api import LayerOperations, PackedProduct
from mlxlora_openblas.sgemm import MOST

#: as in products.h and special.c
_MAGIC, _MOST_INPUTS = 0x7FC1A6E5, 1 << 15
_PACKED, _PACKED_BACK, _ROWS, _LOG_SOFTMAX, _SCALED_EXP = range(1, 6)
_SILU_TIMES, _SILU_SLOPE, _NORMALISE, _NORMALISE_BACK, _ROTATE, _SOFTMAX_BACK = range(6, 12)
_TYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}
_BITS = (2, 4, 8)


class _Header(ctypes.Structure):
    """``struct header`` of products.h."""

    _fields_ = (
        ("magic", ctypes.c_uint32 * 4),
        ("self", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("kind", "length", "queries")),
        *((name, ctypes.c_int32) for name in ("outputs", "inputs", "group", "bits", "type")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("words", "scales", "biases", "cosines", "sines")),
    )


def exp_rows(x: mx.array, queries: int = 0) -> mx.array:
    """``exp(x - x.max(-1))`` of float32 of any shape along the last axis.

    Args:
        x: scores.
        queries: the size of causal groups of rows: the last row of a group sees all numbers of its
            row, the one before all but one, and so on; what a row does not see becomes 0. With 0, all
            rows see everything.
    """
    length = x.shape[-1]
    if x.size > MOST or x.size == 0:
        seen = mx.arange(length - queries, length)[:, None] >= mx.arange(length) if queries else None
        if seen is not None:
            x = mx.where(seen, x.reshape(-1, queries, length), -mx.inf).reshape(x.shape)
        return mx.exp(x - x.max(axis=-1, keepdims=True))
    return (x.reshape(-1, 1) @ _rows(length, queries)).reshape(x.shape)


def log_softmax(x: mx.array) -> mx.array:
    """Float32 (N, V) less the logarithm of each row's sum of ``exp``; in the memory of ``x`` if free."""
    return _changed(_LOG_SOFTMAX, x, mx.zeros((len(x), 1)))


def scaled_exp(x: mx.array, factors: mx.array) -> mx.array:
    """``factors · exp(x)`` of float32 (N, V) and (N, 1); in the memory of ``x`` if that is free."""
    return _changed(_SCALED_EXP, x, factors)


def _changed(kind: int, x: mx.array, factors: mx.array) -> mx.array:
    """Apply an operation to the rows of ``x``: asked for as a product that is added to them."""
    return mx.addmm(x, factors, _rows_of(kind, x.shape[1])) if x.size else x


@lru_cache(maxsize=8)
def _rows_of(kind: int, length: int) -> mx.array:
    return _header(kind, length, outputs=length)


def silu_times(gate: mx.array, y: mx.array) -> mx.array:
    """``silu(gate) · y`` of float32 of the same shape; in the memory of ``y`` if that is free."""
    return _in_place(_of_length(_SILU_TIMES, 1), gate, y)


def silu_slope(gate: mx.array, y: mx.array) -> mx.array:
    """``silu'(gate) · y`` of float32 of the same shape; in the memory of ``y`` if that is free.

    The slope is ``s (1 + gate (1 - s))`` with the sigmoid s.
    """
    return _in_place(_of_length(_SILU_SLOPE, 1), gate, y)


def normalise(x: mx.array, eps: float) -> mx.array:
    """``x · f`` with ``f = 1 / sqrt(mean(x²) + eps)`` along the last axis (D) of float32."""
    return (x.reshape(-1, 1) @ _norm(_NORMALISE, x.shape[-1], eps)).reshape(x.shape)


def normalise_back(x: mx.array, dy: mx.array, eps: float) -> mx.array:
    """The gradient of :func:`normalise` for x: ``(dy - x · sum(x · dy) f² / D) f``."""
    return _in_place(_norm(_NORMALISE_BACK, x.shape[-1], eps), x, dy)


def rotation(cosines: mx.array, sines: mx.array) -> Callable[[mx.array], mx.array]:
    """A function that rotates pairs in float32 (..., T, E): ``x · cosines`` plus neighbor times ``sines``.

    Args:
        cosines: float32 (T, E).
        sines: float32 (T, E), with their signs.
    """
    tables = [mx.contiguous(cosines), mx.contiguous(sines)]
    mx.eval(tables)
    places = dict(zip(("cosines", "sines"), map(_address, tables), strict=True))
    header = _header(_ROTATE, 1, length=cosines.size, **places)

    def rotate(x: mx.array) -> mx.array:
        turned: mx.array = mx.depends(x.reshape(-1, 1) @ header, tables)
        return turned.reshape(x.shape)

    return rotate


def softmax_back(x: mx.array, dy: mx.array) -> mx.array:
    """The gradient of the scores behind a softmax, ``x (dy - sum(x · dy) / sum(x))`` along the last axis.

    Here x is exp(scores), and dy the gradient of the softmax, divided by sum(x). The result takes the
    memory of ``dy`` if that is free.
    """
    return _in_place(_of_length(_SOFTMAX_BACK, x.shape[-1]), x, dy)


LAYERS = LayerOperations(silu_times, silu_slope, normalise, normalise_back, rotation, softmax_back)


def _in_place(header: mx.array, x: mx.array, y: mx.array) -> mx.array:
    """Apply an operation to ``y`` with ``x``, of the same shape: asked for as a product that is added."""
    return mx.addmm(y.reshape(-1, 1), x.reshape(-1, 1), header).reshape(y.shape)


@lru_cache(maxsize=64)
def _norm(kind: int, length: int, eps: float) -> mx.array:
    return _header(kind, 1, length=length, eps=eps)


@lru_cache(maxsize=256)
def _of_length(kind: int, length: int) -> mx.array:
    return _header(kind, 1, length=length)


def packed_product(
    words: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> PackedProduct | None:
    """Float32 products with a packed weight, or None if packed.c does not support it.

    Args:
        words: (outputs, inputs · bits / 32), uint32, as :func:`mlx.core.quantize` makes them.
        scales: (outputs, inputs / group_size).
        biases: the same.
        group_size: weights that share a scale.
        bits: per weight.
    """
    if words.ndim != 2 or bits not in _BITS or group_size % 32 or words.dtype != mx.uint32:
        return None
    outputs, inputs = words.shape[0], words.shape[1] * 32 // bits
    groups = (outputs, inputs // group_size)
    fits = scales.shape == biases.shape == groups and groups[1] * group_size == inputs
    known = scales.dtype in _TYPES and scales.dtype == biases.dtype
    if not fits or not known or outputs < 1 or not 0 < inputs <= _MOST_INPUTS:
        return None
    # Copies, whose memory stays whatever happens to the given arrays.
    parts = [mx.contiguous(part) for part in (words, scales, biases)]
    mx.eval(parts)
    places = dict(zip(("words", "scales", "biases"), map(_address, parts), strict=True))
    sizes = {"outputs": outputs, "inputs": inputs, "group": group_size, "bits": bits}
    header, back = (
        _header(kind, length, type=_TYPES[scales.dtype], **sizes, **places)
        for kind, length in ((_PACKED, outputs), (_PACKED_BACK, inputs))
    )

    def product(x: mx.array, terms: int, matrix: mx.array) -> mx.array:
        y = mx.as_strided(x, (x.size // terms, 1), (1, 1)) @ matrix
        # The header only holds addresses: the parts must live until the product is computed.
        kept: mx.array = mx.depends(y, parts)
        return kept.reshape(*x.shape[:-1], matrix.shape[1])

    return PackedProduct(lambda x: product(x, inputs, header), lambda x: product(x, outputs, back))


@lru_cache(maxsize=256)
def _rows(length: int, queries: int) -> mx.array:
    return _header(_ROWS, 1, length=length, queries=queries)


def _header(kind: int, numbers: int, **fields: float) -> mx.array:
    """A matrix (1, numbers) whose memory begins with a header, which may be longer than the matrix."""
    room = max(numbers, ctypes.sizeof(_Header) // 4)
    memory = mx.array(np.zeros(room, np.float32))
    address = _address(memory)
    magic = (ctypes.c_uint32 * 4)(*range(_MAGIC, _MAGIC + 4))
    header = _Header(magic=magic, self=address, kind=kind, **fields)
    ctypes.memmove(address, ctypes.byref(header), ctypes.sizeof(header))
    view = mx.as_strided(memory, (1, numbers), (numbers, 1))
    mx.eval(view)
    return view


def _address(array: mx.array) -> int:
    """The address of an evaluated array."""
    if array.dtype == mx.bfloat16:  # numpy lacks it
        array = array.view(mx.uint16)
        mx.eval(array)
    address: int = np.array(array, copy=False).ctypes.data
    return address
