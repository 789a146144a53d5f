"""Attention with capped scores, for which MLX has no operation: written out for every device."""

from __future__ import annotations

import mlx.core as mx

# The score of a key that a query does not see; finite, so that a query that sees none gets a mean, not NaN.
_UNSEEN = float(mx.finfo(mx.float32).min)


def capped_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
    cap: float,
) -> mx.array:
    """See :func:`mlxlora_core.model.ops.attention`; the mask is known to fit. Scores are in float32."""
    batch, heads, length, width = queries.shape
    kv_heads, seen = keys.shape[1:3]
    # Queries that share a kv head are stacked: one product, and no copy of the keys.
    rows = (queries * scale).reshape(batch, kv_heads, -1, width)  # (B, K, H / K · T, E)
    scores = (rows @ keys.swapaxes(-1, -2)).astype(mx.float32)  # (B, K, H / K · T, S)
    scores = (mx.tanh(scores / cap) * cap).reshape(batch, heads, length, seen)  # (B, H, T, S)
    if isinstance(mask, str):
        key = mx.arange(seen)
        mask = key <= key[seen - length :, None]  # (T, S)
    if mask is not None:
        unseen = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, _UNSEEN) if unseen else scores + mask.astype(mx.float32)
    weights = mx.softmax(scores, axis=-1).astype(values.dtype)
    mixed = weights.reshape(batch, kv_heads, -1, seen) @ values  # (B, K, H / K · T, E)
    return mixed.reshape(batch, heads, length, values.shape[-1])
