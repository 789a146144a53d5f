"""Softmax, SiLU and cross-entropy, each by the fastest exact way of the device.

On Metal and CUDA these are MLX's own operations. MLX's CPU backend computes an
exponential one element at a time on x86; there, large arrays go through a
range-reduced polynomial (Cephes ``expf``; 3e-7 relative) in compiled kernels,
and each gradient is written out so that nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.layers import on_cpu

# Below this many elements, compiling a kernel costs more than it ever saves.
LARGE = 1 << 16

_LOG2_E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_ROUND = 12582912.0  # 1.5 · 2²³: adding it rounds a float32 to a whole number
_LOWEST = -87.0  # below, exp is less than the smallest normal float32
_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def softmax(scores: mx.array) -> mx.array:
    """Softmax over the last axis; float32 in, float32 out.

    Args:
        scores: (..., V); masked ones are -inf or far below the others.
    """
    return _softmax(scores) if _wants_polynomial(scores) else mx.softmax(scores, axis=-1, precise=True)


def silu_times(gate: mx.array, up: mx.array) -> mx.array:
    """``silu(gate) · up`` (Shazeer 2020, arXiv:2002.05202), element by element."""
    return _silu_times(gate, up) if _wants_polynomial(gate) else nn.silu(gate) * up


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Sum over N of ``logsumexp(logits) - logits[target]``, in float32.

    Args:
        logits: (N, V).
        targets: ids (N,).
    """
    logits = logits.astype(mx.float32)
    if _wants_polynomial(logits):
        total: mx.array = _cross_entropy(logits, targets)[0]
        return total
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
        mask: (T, S), true where a query sees a key; ``"causal"`` with the last
            query at the last key; or None for all.
    """
    if not (on_cpu() and queries.dtype == mx.float32):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    batch, heads, length, width = queries.shape
    kv_heads, seen = keys.shape[1], keys.shape[2]
    if isinstance(mask, str):
        mask = mx.arange(seen - length, seen)[:, None] >= mx.arange(seen)
    # Queries that share a kv head stand under each other: one product, and no copy of the keys.
    grouped = (queries * scale).reshape(batch, kv_heads, heads // kv_heads * length, width)
    scores = grouped @ keys.swapaxes(-1, -2)
    if mask is not None:
        hidden = mx.where(mask, 0.0, -1e9)
        scores = scores.reshape(batch, kv_heads, -1, length, seen) + hidden
    weights = softmax(scores).reshape(batch, kv_heads, -1, seen)
    return (weights @ values).reshape(batch, heads, length, width)


def _wants_polynomial(x: mx.array) -> bool:
    return x.size >= LARGE and x.dtype == mx.float32 and on_cpu()


def _exp(x: mx.array) -> mx.array:
    """``exp(x)`` for x at most 0: 2ⁿ · e^r with r within ±ln 2 / 2."""
    x = mx.maximum(x, _LOWEST)
    n = (x * _LOG2_E + _ROUND) - _ROUND
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = r * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for coefficient in _POLYNOMIAL[2:]:
        p = p * r + coefficient
    power_of_two = ((n.astype(mx.int32) + 127) << 23).view(mx.float32)
    return (p * r * r + r + 1.0) * power_of_two


@mx.compile
def _shifted_exp(x: mx.array, highest: mx.array) -> mx.array:
    return _exp(x - highest)


@mx.compile
def _softmax_gradient(y: mx.array, dy: mx.array, along: mx.array) -> mx.array:
    return y * (dy - along)


@mx.custom_function
def _softmax(x: mx.array) -> mx.array:
    y = _shifted_exp(x, x.max(axis=-1, keepdims=True))
    return y * (1.0 / y.sum(axis=-1, keepdims=True))


@_softmax.vjp
def _softmax_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    y, dy = outputs, cotangents
    return _softmax_gradient(y, dy, (y * dy).sum(axis=-1, keepdims=True))


def _sigmoid(x: mx.array) -> mx.array:
    e = _exp(-mx.abs(x))
    return mx.where(x >= 0, 1.0, e) / (1.0 + e)


@mx.compile
def _silu_times_forward(gate: mx.array, up: mx.array) -> mx.array:
    return gate * _sigmoid(gate) * up


@mx.compile
def _silu_times_gradient(gate: mx.array, up: mx.array, dy: mx.array) -> tuple[mx.array, mx.array]:
    s = _sigmoid(gate)
    return dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s


@mx.custom_function
def _silu_times(gate: mx.array, up: mx.array) -> mx.array:
    return _silu_times_forward(gate, up)


@_silu_times.vjp
def _silu_times_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    return _silu_times_gradient(*primals, cotangents)


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """The sum, and the probabilities (N, V) that its gradient is made of."""
    highest = logits.max(axis=-1, keepdims=True)
    probabilities = _shifted_exp(logits, highest)
    total = probabilities.sum(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
    return (mx.log(total) + highest - chosen).sum(), probabilities * (1.0 / total)


@_cross_entropy.vjp
def _cross_entropy_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    _, targets = primals
    d_sum, probabilities = cotangents[0], outputs[1]
    rows = mx.arange(targets.size)
    return probabilities.at[rows, targets].add(-1.0) * d_sum, mx.zeros(targets.shape, dtype=mx.float32)
