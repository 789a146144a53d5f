"""The angles of rotary positions, in tables that layers share."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np


@lru_cache(maxsize=8)
def angles(
    offset: int, length: int, width: int, theta: float | tuple[float, ...], factor: float
) -> tuple[mx.array, mx.array]:
    """Cosine and sine (T, E) of each feature's angle, the sine with the sign of what it multiplies."""
    cosine, sine = angles_of(np.arange(offset, offset + length), width, theta, factor)
    return mx.array(cosine), mx.array(sine)


def angles_of(
    places: np.ndarray, width: int, theta: float | tuple[float, ...], factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`angles`, at positions (T,)."""
    rates = np.array(theta) if isinstance(theta, tuple) else theta ** (-np.arange(0, width, 2) / width)
    turned = np.repeat(places[:, None] * rates, 2, axis=1)
    signs = np.tile([-1.0, 1.0], width // 2)
    cosine, sine = factor * np.cos(turned), factor * np.sin(turned) * signs
    return cosine.astype(np.float32), sine.astype(np.float32)


@lru_cache(maxsize=8)
def angles_of_rows(
    lengths: tuple[int, ...], width: int, theta: float | tuple[float, ...], factor: float
) -> tuple[mx.array, mx.array]:
    """As :func:`angles`, of rows that stand one after the other and each begin at position 0."""
    longest = angles(0, max(lengths), width, theta, factor)
    places = np.concatenate([np.arange(length) for length in lengths])
    cosine, sine = (mx.array(np.array(table)[places]) for table in longest)
    return cosine, sine


@lru_cache(maxsize=8)
def angles_at(
    places: tuple[int, ...], width: int, theta: float | tuple[float, ...], factor: float
) -> tuple[mx.array, mx.array]:
    """As :func:`angles`, (B, 1, 1, E), of the only token of each of B rows."""
    cosine, sine = angles_of(np.array(places), width, theta, factor)
    return mx.array(cosine[:, None, None]), mx.array(sine[:, None, None])


@lru_cache(maxsize=8)
def turn(offset: int, width: int, theta: float | tuple[float, ...], factor: float) -> mx.array:
    """The matrix (E, E) that turns the features of a row at one position."""
    cosine, sine = (np.array(table)[0] for table in angles(offset, 1, width, theta, factor))
    partner = np.arange(width) ^ 1
    matrix = np.diag(cosine)
    matrix[partner, np.arange(width)] = sine
    return mx.array(matrix)
