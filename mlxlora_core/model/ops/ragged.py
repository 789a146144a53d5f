"""Rows of different lengths that are continued together, by a token each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mlx.core as mx

from mlxlora_core.machine.device import on_cpu

# What a score becomes where a query does not see a key: its exponential is nothing, and no NaN.
_UNSEEN = float(mx.finfo(mx.float32).min)


@dataclass(frozen=True)
class Positions:
    """Where the only token of each row stands.

    Attributes:
        each: the position in each of B rows.
    """

    each: tuple[int, ...]


class RaggedCache(ABC):
    """The cache of one layer for rows of different lengths, which attends by itself."""

    @property
    @abstractmethod
    def offset(self) -> Positions:
        """Tokens that are held of each row."""

    @abstractmethod
    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> mx.array:
        """As :func:`mlxlora_core.model.ops.attend` of a token of each row."""


def attention_to_seen(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, seen: mx.array, cap: float | None
) -> mx.array:
    """Attention (B, H, 1, E) of one query a head, each row by itself.

    On a CPU the sums of a row depend on nothing but the row and C: keys that it does not see count 0.

    Args:
        queries: (B, H, 1, E).
        keys: (B, K, C, E), of which those that are not seen are any finite numbers.
        values: (B, K, C, E), likewise.
        scale: what the scores are multiplied by.
        seen: booleans (B, 1, 1, C), whether the row sees the key; one at least.
        cap: what the scores stay below, or None.
    """
    if cap is None and not on_cpu():
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=seen)
    rows = (queries * scale).reshape(
        queries.shape[0], keys.shape[1], -1, queries.shape[3]
    )  # (B, K, H / K, E)
    scores = (rows @ keys.swapaxes(-1, -2)).astype(mx.float32)  # (B, K, H / K, C)
    if cap is not None:
        scores = mx.tanh(scores / cap) * cap
    weights = mx.softmax(mx.where(seen, scores, _UNSEEN), axis=-1, precise=True)
    return (weights.astype(values.dtype) @ values).reshape(*queries.shape[:3], values.shape[3])
