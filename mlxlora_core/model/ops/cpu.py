"""The operations on a CPU, written out to pass over memory as few times as possible.

MLX's CPU backend takes one pass over memory for each operation of a formula, and per element 12 ns
for ``exp``, 4.6 ns for ``power`` and 0.6 ns for a sum along rows. So here the exponential comes from a
runtime that has a faster one, or is a power of ``e``; sums are products with a vector of ones; and each
gradient is written out. All arrays are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, TypeAlias, cast

import mlx.core as mx

from mlxlora_core.machine.device import lent
from mlxlora_core.model.ops.angles import angles, angles_at, angles_of_rows, turn
from mlxlora_core.model.ops.lent import exp, layers_for, lent_layers, row_sums
from mlxlora_core.model.ops.ragged import Positions
from mlxlora_core.model.ops.rows import Rows

_Pair: TypeAlias = tuple[mx.array, mx.array]


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """See :func:`mlxlora_core.model.ops.rms_norm`."""
    if layers_for(x) is not None:
        return cast(mx.array, _normalise(eps)(x)) * weight
    return cast(_Pair, _rms_norm(eps)(x, weight))[0]


def rotate(
    x: mx.array, offset: int | Rows | Positions, theta: float | tuple[float, ...], factor: float
) -> mx.array:
    """See :func:`mlxlora_core.model.ops.rotate`."""
    length, width = x.shape[-2:]
    if isinstance(offset, Positions):
        return cast(mx.array, _rotate(x, *angles_at(offset.each, width, theta, factor)))
    if isinstance(offset, Rows):
        return _turned(x, angles_of_rows, offset.lengths, width, theta, factor)
    if length == 1:  # one product takes 6 us, the dozens of operations behind mx.fast.rope 125
        return x @ turn(offset, width, theta, factor)
    return _turned(x, angles, offset, length, width, theta, factor)


def silu_times(gate: mx.array, up: mx.array) -> mx.array:
    """See :func:`mlxlora_core.model.ops.silu_times`."""
    if layers_for(gate) is not None and gate.shape == up.shape:
        return cast(mx.array, _silu_times_lent(gate, up))
    return cast(_Pair, _silu_times(gate, up))[0]


def cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array | None) -> mx.array:
    """See :func:`mlxlora_core.model.ops.cross_entropy`."""
    if weights is None:
        weights = mx.ones(targets.shape)
    return cast(_Pair, _cross_entropy(logits, targets, weights))[0]


@cache
def _normalise(eps: float) -> Callable[..., Any]:
    """``LayerOperations.normalise`` as a function with a gradient."""

    @mx.custom_function
    def norm(x: mx.array) -> mx.array:
        return lent_layers().normalise(x, eps)

    @norm.vjp
    def norm_vjp(x: mx.array, dy: mx.array, _: mx.array) -> mx.array:
        return lent_layers().normalise_back(x, dy, eps)

    return cast(Callable[..., Any], norm)


def _rms_norm(eps: float) -> Callable[..., Any]:
    """A function of (x, weight): the normalized x, and the factor (..., 1) that its gradient needs."""

    @mx.custom_function
    def norm(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        factor = mx.rsqrt(row_sums(x * x) * (1.0 / x.shape[-1]) + eps)
        return x * factor * weight, factor

    @norm.vjp
    def norm_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        (x, weight), factor, dy = primals, outputs[1], cotangents[0]
        along = dy * x
        pull = (along @ weight[:, None]) * (factor * factor * (1.0 / x.shape[-1]))  # (..., 1)
        rows = along.reshape(-1, x.shape[-1])  # (·, D)
        return (dy * weight - x * pull) * factor, (factor.reshape(1, -1) @ rows).reshape(-1)  # (..., D), (D,)

    return cast(Callable[..., Any], norm)


def _turned(x: mx.array, table: Callable[..., _Pair], *arguments: Any) -> mx.array:
    """``x``, rotated by the angles of a table (T, E) from :mod:`angles`."""
    if layers_for(x) is None:
        return cast(mx.array, _rotate(x, *table(*arguments)))
    return cast(mx.array, _rotation(table, *arguments)(x))


@lru_cache(maxsize=16)
def _rotation(table: Callable[..., _Pair], *arguments: Any) -> Callable[..., Any]:
    """A function that rotates x by the angles of a table, with its gradient, the rotation back."""
    cosine, sine = table(*arguments)
    turn, turn_back = (lent_layers().rotation(cosine, sign * sine) for sign in (1, -1))
    rotate: Any = mx.custom_function(turn)
    rotate.vjp(lambda x, dy, y: turn_back(dy))
    return cast(Callable[..., Any], rotate)


def _rotated(x: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    x = mx.contiguous(x)
    pairs, half = x.view(mx.uint64), mx.array(32, mx.uint64)  # (B, ·, T, E / 2)
    swapped = ((pairs << half) | (pairs >> half)).view(mx.float32)  # (B, ·, T, E)
    return x * cosine + swapped * sine


@mx.custom_function
def _rotate(x: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    return _rotated(x, cosine, sine)


@_rotate.vjp
def _rotate_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    _, cosine, sine = primals
    return _rotated(cotangents, cosine, -sine), mx.zeros_like(cosine), mx.zeros_like(sine)


@mx.custom_function
def _silu_times(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    """The product, and the sigmoid that its gradient needs."""
    sigmoid = 1.0 / (1.0 + exp(-gate))
    return sigmoid * gate * up, sigmoid


@_silu_times.vjp
def _silu_times_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    (gate, up), sigmoid = primals, outputs[1]
    dy = cotangents[0] * sigmoid
    return dy * up * (1.0 + gate * (1.0 - sigmoid)), dy * gate


@mx.custom_function
def _silu_times_lent(gate: mx.array, up: mx.array) -> mx.array:
    return lent_layers().silu_times(gate, up)


@_silu_times_lent.vjp
def _silu_times_lent_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    (gate, up), layers = primals, lent_layers()
    return layers.silu_slope(gate, cotangents * up), layers.silu_times(gate, cotangents)


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """The sum, and the log-probabilities (N, V) that its gradient needs."""
    log_softmax = lent("log_softmax")
    if log_softmax is None:
        highest = logits.max(axis=-1, keepdims=True)
        logarithms = logits - (highest + mx.log(row_sums(exp(logits - highest))))
    else:
        logarithms = log_softmax(logits)
    chosen = mx.take_along_axis(logarithms, targets[:, None], axis=-1).squeeze(-1)  # (N,)
    return -(chosen * weights).sum(), logarithms


@_cross_entropy.vjp
def _cross_entropy_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    (_, ids, weights), logarithms = primals, outputs[1]
    scaled_exp, factors = lent("scaled_exp"), (cotangents[0] * weights)[:, None]  # (N, 1)
    gradient = exp(logarithms) * factors if scaled_exp is None else scaled_exp(logarithms, factors)
    at_target = mx.take_along_axis(gradient, ids[:, None], axis=-1) - factors
    gradient = mx.put_along_axis(gradient, ids[:, None], at_target, axis=-1)
    return gradient, mx.zeros_like(ids), mx.zeros_like(weights)
