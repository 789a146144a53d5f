"""The weights of SmolLM2 in GGUF, worked out without mlxlora; the layouts: docs/kinds/weight-loaders.md."""

from __future__ import annotations

from typing import Any

import numpy as np

_BLOCKS = {
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
    "Q8_0": np.dtype([("d", "<f2"), ("q", "i1", 32)]),
}


def expanded(kind: str, shape: tuple[int, ...], data: bytes) -> np.ndarray[Any, Any]:
    """A tensor of one of the types that are in the file, float64, in which every product is exact."""
    if kind == "F32":
        return np.frombuffer(data, "<f4").reshape(shape).astype(np.float64)
    block = np.frombuffer(data, _BLOCKS[kind])
    numbers = block["q"] if kind == "Q8_0" else np.concatenate([block["q"] & 15, block["q"] >> 4], -1)
    offset = block["m"].astype(np.float64)[:, None] if kind == "Q4_1" else 0.0
    return (block["d"].astype(np.float64)[:, None] * numbers + offset).reshape(shape)
