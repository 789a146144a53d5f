"""Blocks of a GGUF tensor as MLX's affine groups: integers, and a scale and a bias for 32 of them.

A weight is ``scale · integer + bias``. For every type but Q6_K, which has groups of 16, this
is what the file says, to the bit. Rows are runs of blocks; n is the number of blocks.
The blocks: ``ggml/src/ggml-common.h`` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxlora_gguf.blocks import GROUP, BlockType

Array = np.ndarray[Any, np.dtype[Any]]

_HALF, _BYTE = "<f2", "u1"
_K_FIELDS = [("scale", _HALF), ("bias", _HALF), ("six", _BYTE, 12)]
BLOCKS = {
    "Q4_0": np.dtype([("scale", _HALF), ("low", _BYTE, 16)]),
    "Q4_1": np.dtype([("scale", _HALF), ("bias", _HALF), ("low", _BYTE, 16)]),
    "Q5_0": np.dtype([("scale", _HALF), ("high", _BYTE, 4), ("low", _BYTE, 16)]),
    "Q5_1": np.dtype([("scale", _HALF), ("bias", _HALF), ("high", _BYTE, 4), ("low", _BYTE, 16)]),
    "Q8_0": np.dtype([("scale", _HALF), ("low", _BYTE, 32)]),
    "Q4_K": np.dtype([*_K_FIELDS, ("low", _BYTE, 128)]),
    "Q5_K": np.dtype([*_K_FIELDS, ("high", _BYTE, 32), ("low", _BYTE, 128)]),
    "Q6_K": np.dtype(
        [("low", _BYTE, (2, 2, 32)), ("high", _BYTE, (2, 32)), ("six", "i1", 16), ("scale", _HALF)]
    ),
}
_LOW_HALVES = np.uint64(0x0F0F0F0F0F0F0F0F)  # of the bytes in a word
#: the integer that stands for 0 in the types that have no bias of their own
_ZERO = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}


def integers(kind: BlockType, rows: Array) -> Array:
    """The integers (R, columns), uint8, of rows of packed blocks (R, bytes)."""
    blocks = rows.reshape(-1).view(BLOCKS[kind.name])
    low = blocks["low"]
    if kind.bits == 8:
        return (low ^ 0x80).reshape(len(rows), -1)
    size = 32 if kind.super_blocks else 16
    run = f"V{size}"  # half of the integers that a run of bytes holds, moved at once: four times as fast
    packed = np.ascontiguousarray(low.view(run)).view("<u8")
    found = np.empty((len(blocks), low.shape[-1] // size, 2), run)
    found[:, :, 0] = (packed & _LOW_HALVES).view(run)
    found[:, :, 1] = ((packed >> np.uint64(4)) & _LOW_HALVES).view(run)
    steps = found.view(np.uint8)
    if kind.bits == 5:
        steps |= _fifth_bits(kind, blocks).reshape(steps.shape) << 4
    return steps.reshape(len(rows), -1)


def _fifth_bits(kind: BlockType, blocks: Array) -> Array:
    """The highest bit of each integer of five, (n, weights)."""
    if not kind.super_blocks:
        return np.unpackbits(np.ascontiguousarray(blocks["high"]), axis=-1, bitorder="little")
    # Byte i holds the bits of integer i of each of the eight groups.
    groups = np.arange(8, dtype=np.uint8)[:, None]
    return (blocks["high"][:, None] >> groups) & 1


def words(kind: BlockType, rows: Array) -> Array:
    """The integers as MLX packs them: a stream of bits along the row, (R, columns · bits / 32) uint32."""
    steps = integers(kind, rows)
    if kind.bits == 4:
        pairs = steps.view("<u2")
        packed = (pairs | (pairs >> 4)).astype(np.uint8)
    elif kind.bits == 5:
        packed = _five_bits(steps.view("<u8")).reshape(len(rows), -1)
    else:
        packed = steps
    return np.ascontiguousarray(packed).view("<u4")


def _five_bits(eight: Array) -> Array:
    """Eight integers of five bits, a byte each in a word of 64 bits, moved together into five bytes."""
    for half, gap in ((8, 3), (16, 6), (32, 12)):
        # Of two neighbours of `half` bits, the upper one moves down over the gap above the lower one.
        lower = np.uint64(sum(((1 << half) - 1) << 2 * half * n for n in range(32 // half)))
        eight = (eight & lower) | ((eight & ~lower) >> np.uint64(gap))
    return np.ascontiguousarray(eight)[..., None].view(np.uint8)[..., :5]


def scales(kind: BlockType, rows: Array) -> Array:
    """The scale of each group of 32, (R, columns / 32): float16 as stored, float32 of super-blocks."""
    blocks = rows.reshape(-1).view(BLOCKS[kind.name])
    if not kind.super_blocks:
        return np.ascontiguousarray(blocks["scale"]).reshape(len(rows), -1)
    factors = blocks["scale"].astype(np.float32)[:, None] * _six_bits(blocks["six"])[0]
    return factors.reshape(len(rows), -1)


def biases(kind: BlockType, rows: Array) -> Array:
    """The bias of each group of 32, (R, columns / 32): float16 as stored, else float32 (exact)."""
    blocks = rows.reshape(-1).view(BLOCKS[kind.name])
    if kind.super_blocks:
        found = -(blocks["bias"].astype(np.float32)[:, None] * _six_bits(blocks["six"])[1])
    elif kind.name in _ZERO:
        found = blocks["scale"].astype(np.float32) * np.float32(-_ZERO[kind.name])
    else:
        found = np.ascontiguousarray(blocks["bias"])
    return found.reshape(len(rows), -1)


def _six_bits(packed: Array) -> tuple[Array, Array]:
    """The eight scales and eight biases (n, 8), integers of 6 bits, in 12 bytes (n, 12)."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    factors = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    offsets = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    return factors, offsets


def dense(kind: BlockType, rows: Array) -> Array:
    """The weights (R, columns), float32: of Q6_K exactly what the file says, of the others rounded once."""
    if kind.name == "Q6_K":
        return _six_bit_weights(rows)
    steps = integers(kind, rows).reshape(len(rows), -1, GROUP).astype(np.float32)
    steps *= scales(kind, rows).astype(np.float32)[..., None]
    steps += biases(kind, rows).astype(np.float32)[..., None]
    return steps.reshape(len(rows), -1)


def _six_bit_weights(rows: Array) -> Array:
    """Q6_K: d · scale · (integer - 32), 16 of them to a scale; no product is rounded in float32."""
    blocks = rows.reshape(-1).view(BLOCKS["Q6_K"])
    # Byte i of 32 holds two bits of each of four integers, which stand 32 apart: (n, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    upper = (blocks["high"][:, :, None] >> shifts) & 3
    lower = np.concatenate([blocks["low"] & 15, blocks["low"] >> 4], axis=2)
    steps = (lower | upper << 4).astype(np.float32) - 32
    factors = blocks["scale"].astype(np.float32)[:, None] * blocks["six"]
    weights: Array = steps.reshape(len(blocks), 16, 16) * factors[..., None]
    return weights.reshape(len(rows), -1)
