"""Attention, SiLU and cross-entropy, each by the fastest exact way of the device.

On Metal and CUDA these are MLX's own operations. On a CPU MLX computes ``exp``
in 12 ns an element and ``power`` in 4.6 ns, so that ``e`` to a power stands in
for the exponential of large arrays; and each gradient is written out, so that
nothing is computed twice.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias, cast

import mlx.core as mx

from mlxlora_core.layers import on_cpu

_Pair: TypeAlias = tuple[mx.array, mx.array]

# Below this many elements MLX's own operation, which is one call, is as fast.
LARGE = 1 << 12

# e to less than this is far below the last bit of any sum with a 1 in it, and slow to compute.
_LOWEST = -80.0


def softmax(scores: mx.array) -> mx.array:
    """Softmax over the last axis; float32 in, float32 out.

    Args:
        scores: (..., V); masked ones are -inf or far below the others.
    """
    if not _pays(scores):
        return mx.softmax(scores, axis=-1, precise=True)
    return cast(mx.array, _softmax(scores))


def silu_times(gate: mx.array, up: mx.array) -> mx.array:
    """``silu(gate) · up`` (Shazeer 2020, arXiv:2002.05202), element by element."""
    if not _pays(gate):
        return mx.sigmoid(gate) * gate * up
    return cast(_Pair, _silu_times(gate, up))[0]


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Sum over N of ``logsumexp(logits) - logits[target]``, in float32.

    Args:
        logits: (N, V).
        targets: ids (N,).
    """
    logits = logits.astype(mx.float32)
    if _pays(logits):
        return cast(_Pair, _cross_entropy(logits, targets))[0]
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return (mx.logsumexp(logits, axis=-1) - chosen).sum()


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Grouped-query attention (B, H, T, E).

    Args:
        queries: (B, H, T, E).
        keys: (B, K, S, E), with H a multiple of K.
        values: (B, K, S, E).
        scale: what the scores are multiplied by.
        mask: booleans (T, S), true where a query sees a key; ``"causal"`` with
            the last query at the last key; or None for all.
    """
    batch, heads, length, width = queries.shape
    kv_heads, seen = keys.shape[1], keys.shape[2]
    if length == 1 or not _pays(queries):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    if isinstance(mask, str):
        mask = mx.arange(seen - length, seen)[:, None] >= mx.arange(seen)
    # Queries that share a kv head stand under each other: one product, and no copy of the keys.
    grouped = (queries * scale).reshape(batch, kv_heads, heads // kv_heads * length, width)
    scores = grouped @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = scores.reshape(batch, kv_heads, -1, length, seen) + mx.where(mask, 0.0, -mx.inf)
    weights = softmax(scores).reshape(batch, kv_heads, -1, seen)
    return (weights @ values).reshape(batch, heads, length, width)


def _pays(x: mx.array) -> bool:
    return x.size >= LARGE and x.dtype == mx.float32 and on_cpu()


def _exp(x: mx.array) -> mx.array:
    """``exp(x)`` for x at most 0."""
    return mx.power(math.e, mx.maximum(x, _LOWEST))


def _normalised(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Softmax over the last axis, and the maximum and the sum of exponentials it is made from."""
    highest = x.max(axis=-1, keepdims=True)
    e = _exp(x - highest)
    total = e.sum(axis=-1, keepdims=True)
    return e * (1.0 / total), highest, total


@mx.custom_function
def _softmax(x: mx.array) -> mx.array:
    return _normalised(x)[0]


@_softmax.vjp
def _softmax_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    y, dy = outputs, cotangents
    return y * (dy - (y * dy).sum(axis=-1, keepdims=True))


@mx.custom_function
def _silu_times(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    """The product, and the sigmoid that its gradient is made of."""
    sigmoid = 1.0 / (1.0 + mx.power(math.e, mx.clip(-gate, _LOWEST, -_LOWEST)))
    return sigmoid * gate * up, sigmoid


@_silu_times.vjp
def _silu_times_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    (gate, up), sigmoid = primals, outputs[1]
    dy = cotangents[0] * sigmoid
    return dy * up * (1.0 + gate * (1.0 - sigmoid)), dy * gate


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """The sum, and the probabilities (N, V) that its gradient is made of."""
    probabilities, highest, total = _normalised(logits)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
    return (mx.log(total) + highest - chosen).sum(), probabilities


@_cross_entropy.vjp
def _cross_entropy_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    targets, probabilities = primals[1][:, None], outputs[1]
    at_target = mx.take_along_axis(probabilities, targets, axis=-1) - 1.0
    gradient = mx.put_along_axis(probabilities, targets, at_target, axis=-1)
    return gradient * cotangents[0], mx.zeros_like(primals[1])
