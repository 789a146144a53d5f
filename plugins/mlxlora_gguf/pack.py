"""The way back of :mod:`mlxlora_gguf.unpack`: numbers, and MLX's affine groups, as blocks of a GGUF tensor.

Rows are (R, columns) and become (R, bytes); a group is 32 weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxlora_gguf.blocks import GROUP, BlockType
from mlxlora_gguf.unpack import BLOCKS, Array

#: the largest integer of each type that can be made of numbers; those of Q8_0 lie around 0
_MOST = {"Q4_1": 15, "Q5_1": 31, "Q8_0": 127}


def integers(words: Array, bits: int) -> Array:
    """The integers (R, columns), uint8, in MLX's stream of bits (R, columns · bits / 32) uint32."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        spread = (stream[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return spread.reshape(len(stream), -1)
    single = np.unpackbits(stream, axis=-1, bitorder="little").reshape(len(stream), -1, bits)
    return np.packbits(single, axis=-1, bitorder="little")[..., 0]


def blocks(kind: BlockType, steps: Array, scales: Array, biases: Array) -> Array:
    """Blocks of Q4_1, Q5_1 or Q8_0, of integers and what they share.

    Args:
        kind: of the blocks; Q8_0 has no bias: it is -128 times the scale.
        steps: (R, columns), uint8, no larger than the type holds.
        scales: (R, columns / 32), float16.
        biases: likewise.
    """
    found = np.zeros(steps.size // GROUP, BLOCKS[kind.name])
    found["scale"] = scales.reshape(-1)
    grouped = steps.reshape(-1, GROUP)
    if kind.name == "Q8_0":
        found["low"] = grouped ^ 0x80
        return found.view(np.uint8).reshape(len(steps), -1)
    found["bias"] = biases.reshape(-1)
    low = grouped & 15
    found["low"] = low[:, :16] | low[:, 16:] << 4
    if kind.name == "Q5_1":
        found["high"] = np.packbits(grouped >> 4, axis=-1, bitorder="little")
    return found.view(np.uint8).reshape(len(steps), -1)


def rounded(kind: BlockType, rows: Array) -> Array:
    """Blocks of Q4_1, Q5_1 or Q8_0 that come next to numbers (R, columns), float32.

    A group's scale and bias are rounded first, so that the integers make up for it.
    What float16 cannot hold becomes infinite, which the caller must look for.
    """
    grouped = rows.reshape(-1, GROUP)
    most = _MOST[kind.name]
    if kind.name == "Q8_0":
        scales = _half(np.abs(grouped).max(axis=-1) / most)
        steps = np.clip(_divided(grouped, scales), -most, most) + 128
        biases = scales
    else:
        lowest = grouped.min(axis=-1)
        biases = _half(lowest)
        scales = _half((grouped.max(axis=-1) - biases.astype(np.float32)) / most)
        steps = np.clip(_divided(grouped - biases.astype(np.float32)[:, None], scales), 0, most)
    return blocks(kind, steps.astype(np.uint8).reshape(rows.shape), scales, biases)


def _half(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float16)


def _divided(grouped: Array, scales: Array) -> Array:
    """Each number over the scale of its group, to the next whole number; 0 where the scale is 0."""
    by = scales.astype(np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(by > 0, np.rint(grouped / by), 0)
    return found


def dense(kind: BlockType, rows: Any) -> Array:
    """Numbers of an MLX array (R, columns) as F32, F16 or BF16, (R, bytes)."""
    import mlx.core as mx

    cast = rows.astype({"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[kind.name])
    plain = np.array(cast.view(mx.uint32 if kind.name == "F32" else mx.uint16))
    return plain.view(np.uint8).reshape(len(plain), -1)
