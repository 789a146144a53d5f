"""What is asked of special.c: products with matrices that stand for something else.

Only where MLX calls the ``cblas_sgemm`` of sgemm.c. None of it has a gradient:
one that is asked for is NaN.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlxlora_core.api import PackedProduct
from mlxlora_openblas.sgemm import MOST

#: as in products.h and special.c
_MAGIC, _MOST_INPUTS = 0x7FC1A6E5, 1 << 15
_PACKED, _SIGMOIDS, _ROWS, _PACKED_BACK = 1, 2, 3, 4
_TYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}
_BITS = (2, 4, 8)


class _Header(ctypes.Structure):
    """``struct header`` of products.h."""

    _fields_ = (
        ("magic", ctypes.c_uint32 * 4),
        ("self", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("kind", "length", "queries")),
        *((name, ctypes.c_int32) for name in ("outputs", "inputs", "group", "bits", "type")),
        *((name, ctypes.c_void_p) for name in ("words", "scales", "biases")),
    )


def sigmoid(x: mx.array) -> mx.array:
    """``1 / (1 + exp(-x))`` of float32 of any shape."""
    if x.size > MOST:
        return mx.sigmoid(x)
    return (x.reshape(-1, 1) @ _sigmoids()).reshape(x.shape)


def exp_rows(x: mx.array, queries: int = 0) -> mx.array:
    """``exp(x - x.max(-1))`` of float32 of any shape along the last axis.

    Args:
        x: scores.
        queries: where rows come in groups of so many, causal ones: the last of a group sees
            all numbers of its row, the one before all but one, and so on; what a row does
            not see is 0. With 0 all rows see all.
    """
    length = x.shape[-1]
    if x.size > MOST or x.size == 0:
        seen = mx.arange(length - queries, length)[:, None] >= mx.arange(length) if queries else None
        if seen is not None:
            x = mx.where(seen, x.reshape(-1, queries, length), -mx.inf).reshape(x.shape)
        return mx.exp(x - x.max(axis=-1, keepdims=True))
    return (x.reshape(-1, 1) @ _rows(length, queries)).reshape(x.shape)


def packed_product(
    words: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> PackedProduct | None:
    """Products of float32 with a packed weight, or None where packed.c cannot.

    Args:
        words: (outputs, inputs · bits / 32), uint32, as :func:`mlx.core.quantize` makes them.
        scales: (outputs, inputs / group_size).
        biases: the same.
        group_size: weights that share a scale.
        bits: of a weight.
    """
    if words.ndim != 2 or bits not in _BITS or group_size % 32 or words.dtype != mx.uint32:
        return None
    outputs, inputs = words.shape[0], words.shape[1] * 32 // bits
    groups = (outputs, inputs // group_size)
    fits = scales.shape == biases.shape == groups and groups[1] * group_size == inputs
    known = scales.dtype in _TYPES and scales.dtype == biases.dtype
    if not fits or not known or outputs < 1 or not 0 < inputs <= _MOST_INPUTS:
        return None
    # Arrays of their own: whatever becomes of the given ones, these keep the memory.
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
        # The header knows addresses only: until the product is there, the parts have to be.
        kept: mx.array = mx.depends(y, parts)
        return kept.reshape(*x.shape[:-1], matrix.shape[1])

    return PackedProduct(lambda x: product(x, inputs, header), lambda x: product(x, outputs, back))


@lru_cache(maxsize=1)
def _sigmoids() -> mx.array:
    return _header(_SIGMOIDS, 1)


@lru_cache(maxsize=256)
def _rows(length: int, queries: int) -> mx.array:
    return _header(_ROWS, 1, length=length, queries=queries)


def _header(kind: int, numbers: int, **fields: int) -> mx.array:
    """A matrix (1, numbers) that begins with a header, or is its first part."""
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
    """Where an array that was computed lies in memory."""
    if array.dtype == mx.bfloat16:  # numpy does not know it
        array = array.view(mx.uint16)
        mx.eval(array)
    address: int = np.array(array, copy=False).ctypes.data
    return address
