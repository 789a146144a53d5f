"""Packed integers to bytes, many at a time.

``mx.dequantize`` takes its values one by one on a CPU. Here a machine word
carries up to eight of them, and each of its operations moves all eight.
"""

from __future__ import annotations

import mlx.core as mx

# bits -> values in the smallest run of whole bytes, which is spread over one
# word of as many bytes. Larger words would do too, and take longer.
_RUNS = {2: (4, mx.uint32), 3: (8, mx.uint64), 4: (2, mx.uint16), 5: (8, mx.uint64), 6: (4, mx.uint32)}


def unpack(packed: mx.array, bits: int) -> mx.array:
    """The integers (rows, columns) in words (rows, columns · bits / 32) of MLX's layout, as uint8.

    The layout is a stream of bits: value n of a row stands in the bits from
    ``n · bits`` on, lowest bit first.

    Args:
        packed: uint32.
        bits: of a value: 2, 3, 4, 5, 6 or 8.
    """
    stream = packed.view(mx.uint8)
    if bits == 8:
        return stream
    values, word = _RUNS[bits]
    runs = _join(stream.reshape(packed.shape[0], -1, values * bits // 8), word)
    half = values // 2
    while half:
        # Within each 2 · half bytes stand 2 · half values, close together: the
        # lower half stays, the upper half goes up to where its bytes begin.
        lower = sum(((1 << half * bits) - 1) << 16 * half * n for n in range(values // (2 * half)))
        stay, move = mx.array(lower, word), mx.array(lower << 8 * half, word)
        runs = (runs & stay) | ((runs << mx.array(half * (8 - bits), word)) & move)
        half //= 2
    return runs.view(mx.uint8)


def _join(stream: mx.array, word: mx.Dtype) -> mx.array:
    """The words (rows, n) that bytes (rows, n, k) make, lowest byte first."""
    joined = stream[..., 0].astype(word)
    for k in range(1, stream.shape[-1]):
        joined = joined | (stream[..., k].astype(word) << mx.array(8 * k, word))
    return joined
