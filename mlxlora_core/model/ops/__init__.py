"""The operations of a transformer that are not linears, each in the fastest exact way of the device.

On Metal and CUDA these are MLX's own operations. On a CPU, large float32 arrays are computed by
:mod:`mlxlora_core.model.ops.cpu` and ``cpu_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxlora_core.machine.device import on_cpu
from mlxlora_core.model.ops import cpu, cpu_attention
from mlxlora_core.model.ops.capped import capped_attention
from mlxlora_core.model.ops.ragged import Positions, RaggedCache
from mlxlora_core.model.ops.rows import Mask, Rows, apart, together
from mlxlora_core.values import Cache

# With fewer elements than this, MLX's own operation, a single call, is as fast.
LARGE = 1 << 12

# Up to so many rows MLX's own norm is as fast, and gives a row the same bits whatever the others are.
_FEW_ROWS = 32


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """``x · rsqrt(mean(x²) + eps) · weight`` over the last axis.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.

    Args:
        x: (..., D).
        weight: (D,).
        eps: what is added to the mean square.
    """
    pays = _pays(x) and x.size > _FEW_ROWS * x.shape[-1]
    return cpu.rms_norm(x, weight, eps) if pays else mx.fast.rms_norm(x, weight, eps)


def rotate(
    x: mx.array, offset: int | Rows | Positions, theta: float | tuple[float, ...], factor: float = 1.0
) -> mx.array:
    """Apply rotary positions to (B, ·, T, E).

    Neighboring features 2i and 2i + 1 are rotated by the angle ``position · theta^(-2i/E)``.
    Source: Su et al. 2021, arXiv:2104.09864, equation 34.

    Args:
        x: (B, ·, T, E).
        offset: position of the first token; or packed rows, each of which begins at position 0; or
            the positions of B rows that have one token each.
        theta: base of the wavelengths; or E / 2 angles, the rotation of each pair per position.
        factor: multiplies the rotated features.
    """
    if x.dtype == mx.float32 and on_cpu():
        return cpu.rotate(x, offset, theta, factor)
    if isinstance(offset, Rows):
        return together(rotate(apart(x, offset), 0, theta, factor), offset)
    places = mx.array(offset.each) if isinstance(offset, Positions) else offset
    if factor != 1:
        x = x * factor
    base, periods = (None, _periods(theta)) if isinstance(theta, tuple) else (theta, None)
    return mx.fast.rope(x, x.shape[-1], traditional=True, base=base, scale=1.0, offset=places, freqs=periods)


@lru_cache(maxsize=8)
def _periods(angles: tuple[float, ...]) -> mx.array:
    """One over the angles (E / 2,), as MLX's rope takes them."""
    with np.errstate(divide="ignore"):  # a pair that does not rotate
        return mx.array((1.0 / np.array(angles)).astype(np.float32))


def silu_times(gate: mx.array, up: mx.array) -> mx.array:
    """``silu(gate) · up`` (Shazeer 2020, arXiv:2002.05202), element by element.

    SiLU is computed in float32 and rounded once to the type of the gate, as in torch.
    """
    if gate.dtype == mx.float32 and on_cpu():  # of any size, so that a result does not depend on the batch
        return cpu.silu_times(gate, up)
    return cast(mx.array, _silu_times(gate, up))


@mx.custom_function
def _silu_times(gate: mx.array, up: mx.array) -> mx.array:
    return _silu_product(gate, up) if on_cpu() else _as_one(_silu_product)(gate, up)


@_silu_times.vjp
def _silu_times_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    """Computed from the inputs alone: what stands in float32 between would take twice their memory."""
    (gate, up), dy = primals, cotangents
    x = gate.astype(mx.float32)
    sigmoid = mx.sigmoid(x)
    slope = sigmoid * (1 + x * (1 - sigmoid))
    return ((dy * up) * slope).astype(gate.dtype), dy * (sigmoid * x).astype(up.dtype)


def _silu_product(gate: mx.array, up: mx.array) -> mx.array:
    x = gate.astype(mx.float32)
    return (mx.sigmoid(x) * x).astype(gate.dtype) * up


def gelu_times(gate: mx.array, up: mx.array) -> mx.array:
    """``gelu(gate) · up``, element by element, with a hyperbolic tangent for the error function.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2. The gate is computed in float32.
    """
    return _gelu_times(gate, up) if on_cpu() else _as_one(_gelu_times)(gate, up)


def _gelu_times(gate: mx.array, up: mx.array) -> mx.array:
    x = gate.astype(mx.float32)
    gelu = 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return gelu.astype(gate.dtype) * up


@lru_cache(maxsize=8)
def _as_one(function: Callable[[mx.array, mx.array], mx.array]) -> Callable[[mx.array, mx.array], mx.array]:
    """An elementwise function, compiled so that a GPU computes it in one pass, for any shape."""
    return mx.compile(function, shapeless=True)


def cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array | None = None) -> mx.array:
    """Sum over N of ``weight · (logsumexp(logits) - logits[target])``, in float32.

    Args:
        logits: (N, V).
        targets: ids (N,).
        weights: float32 (N,); None is 1 for all.
    """
    logits = logits.astype(mx.float32)
    if _pays(logits):
        return cpu.cross_entropy(logits, targets, weights)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)  # (N,)
    each = mx.logsumexp(logits, axis=-1) - chosen
    return (each if weights is None else each * weights).sum()


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: Mask,
    cap: float | None = None,
) -> mx.array:
    """Grouped-query attention (B, H, T, E).

    Args:
        queries: (B, H, T, E).
        keys: (B, K, S, E), with H a multiple of K.
        values: (B, K, S, E).
        scale: multiplies the scores.
        mask: None if all queries see all keys; ``"causal"``, with the last query at the last key;
            an array that broadcasts to (B, H, T, S), either booleans, true where a query sees a key (a
            query that sees none gets the mean of all values), or numbers to add to the scores, of a
            type no wider than the result's; or :class:`Rows` for packed rows.
        cap: bounds the scores: before the mask, each becomes ``cap · tanh(score / cap)``.

    Raises:
        ValueError: another mask, or H is not a multiple of K.
    """
    heads, length = queries.shape[1:3]
    if heads % keys.shape[1]:
        raise ValueError(f"attention: {heads} heads of queries cannot share {keys.shape[1]} of keys")
    if mask is not None:
        _check_mask(mask, (*queries.shape[:3], keys.shape[2]), queries.dtype)
    if isinstance(mask, Rows):
        if cap is None and _pays(queries):
            return cpu_attention.attention_of_rows(queries, keys, values, scale, mask)
        return _attention_apart(queries, keys, values, scale, mask, cap)
    if cap is not None:
        return capped_attention(queries, keys, values, scale, mask, cap)
    if length == 1 and mask is None and on_cpu():
        return cpu_attention.attention_of_one(queries, keys, values, scale)
    if _pays(queries):
        return cpu_attention.attention(queries, keys, values, scale, mask)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: Mask,
    cache: Cache | RaggedCache | None = None,
    window: int | None = None,
    cap: float | None = None,
) -> mx.array:
    """Attention (B, H, T, E) of tokens to themselves and to those in a cache, to which they are added.

    Args:
        queries: (B, H, T, E), already rotated.
        keys: (B, K, T, E) of the same tokens, already rotated, with H a multiple of K.
        values: (B, K, T, E).
        scale: multiplies the scores.
        mask: from :func:`attention_mask` for these tokens and the window.
        cache: of this layer.
        window: how many tokens a token sees, including itself; None is all before it.
        cap: as for :func:`attention`.
    """
    if isinstance(cache, RaggedCache):
        return cache.attend(queries, keys, values, scale, window, cap)
    if cache is not None:
        keys, values = cache.update(keys, values)
    if window is not None:
        # No query sees further back than the first one.
        reach = window + queries.shape[2] - 1
        keys, values = keys[:, :, -reach:], values[:, :, -reach:]
    return attention(queries, keys, values, scale, mask, cap)


def _attention_apart(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, rows: Rows, cap: float | None
) -> mx.array:
    """Attention within each of the packed rows, which are unpacked for it."""
    mask = attention_mask(max(rows.lengths), 0, rows.window)
    queries, keys, values = (apart(x, rows) for x in (queries, keys, values))
    return together(attention(queries, keys, values, scale, mask, cap), rows)


def attention_mask(tokens: int, held: int, window: int | None, lengths: Sequence[int] | None = None) -> Mask:
    """Which keys each of T queries sees: those up to itself, at most ``window`` of them.

    Args:
        tokens: T.
        held: how many keys a cache holds already.
        window: how many tokens a token sees, including itself; None is all before it.
        lengths: tokens of each row, if rows are packed in the T; a query sees no key of another row.
            None is a single row.

    Returns:
        None if every query sees every key, ``"causal"``, :class:`Rows`, or booleans (T, S) for the
        last S keys, those that any of the queries sees.

    Raises:
        ValueError: the lengths do not add up to T, or are given with a cache that holds keys.
    """
    if lengths is not None:
        rows = Rows(tuple(lengths), window)
        if sum(rows.lengths) != tokens or held:
            raise ValueError(f"rows of {rows.lengths} tokens are not {tokens} tokens after {held}")
        if len(rows.lengths) > 1:
            return rows
    if tokens == 1:
        return None
    if window is None or held + tokens <= window:
        return "causal"
    key = mx.arange(min(held + tokens, window + tokens - 1))
    query = key[-tokens:, None]
    return (key <= query) & (key > query - window)


def positions(mask: Mask, cache: Cache | RaggedCache | None) -> int | Rows | Positions:
    """The ``offset`` that :func:`rotate` takes for tokens with this mask that follow those in a cache."""
    if isinstance(mask, Rows):
        return mask
    return 0 if cache is None else cache.offset


def _pays(x: mx.array) -> bool:
    """Whether the operations written out for a CPU are faster for ``x``."""
    return x.size >= LARGE and x.dtype == mx.float32 and on_cpu()


def _check_mask(mask: mx.array | Rows | str, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Refuse a mask that does not fit scores of ``shape`` (B, H, T, S) and a result of type ``dtype``."""
    if isinstance(mask, Rows):
        if shape[0] != 1 or not sum(mask.lengths) == shape[2] == shape[3]:
            raise ValueError(
                f"attention: rows of {mask.lengths} tokens do not stand in (B, H, T, S) = {shape}"
            )
        return
    wanted = "None, 'causal', Rows, or booleans or "
    wanted += f"{str(dtype).removeprefix('mlx.core.')} that broadcast to (B, H, T, S) = {shape}"
    if not isinstance(mask, mx.array):
        if mask != "causal":
            raise ValueError(f"attention: mask is {mask!r}, wanted {wanted}")
        return
    fits = mask.ndim <= 4 and all(
        size in (1, whole) for size, whole in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits or (mask.dtype != mx.bool_ and mx.result_type(mask.dtype, dtype) != dtype):
        got = f"{str(mask.dtype).removeprefix('mlx.core.')} {mask.shape}"
        raise ValueError(f"attention: mask is {got}, wanted {wanted}")
