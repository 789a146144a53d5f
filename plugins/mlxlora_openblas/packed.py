"""Products of a few rows with a weight that stays packed, by packed.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import mlx.core as mx
import numpy as np

#: as in packed.c
_MAGIC, _MOST_INPUTS = 0x7FC1A6E5, 1 << 15
_TYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}
_BITS = (2, 4, 8)


class _Header(ctypes.Structure):
    """``struct header`` of packed.c."""

    _fields_ = (
        ("magic", ctypes.c_uint32 * 4),
        ("self", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


def packed_product(
    words: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> Callable[[mx.array], mx.array] | None:
    """The function that multiplies float32 (..., inputs) by a packed weight, or None where packed.c cannot.

    Only where MLX calls the ``cblas_sgemm`` of sgemm.c. It has no gradient: one
    that is asked for is NaN.

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
    if not fits or not known or not 0 < inputs <= _MOST_INPUTS or outputs * 4 < ctypes.sizeof(_Header):
        return None
    # Arrays of their own: whatever becomes of the given ones, these keep the memory.
    parts = [mx.contiguous(part) for part in (words, scales, biases)]
    header = mx.zeros((1, outputs))
    mx.eval(header, parts)
    address = _address(header)
    _Header.from_address(address).__init__(  # type: ignore[misc]  # fills what is there
        (ctypes.c_uint32 * 4)(*range(_MAGIC, _MAGIC + 4)),
        *(address, *map(_address, parts), outputs, inputs, group_size, bits, _TYPES[scales.dtype]),
    )

    def multiply(x: mx.array) -> mx.array:
        rows = x.size // inputs
        product = mx.as_strided(x, (rows, 1), (1, 1)) @ header
        # The header knows addresses only: until the product is there, the parts have to be.
        kept: mx.array = mx.depends(product, parts)
        return kept.reshape(*x.shape[:-1], outputs)

    return multiply


def _address(array: mx.array) -> int:
    """Where an array that was computed lies in memory."""
    if array.dtype == mx.bfloat16:  # numpy does not know it
        array = array.view(mx.uint16)
        mx.eval(array)
    address: int = np.array(array, copy=False).ctypes.data
    return address
