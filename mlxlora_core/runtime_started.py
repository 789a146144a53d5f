"""What a runtime hands over once it is started: words, and functions that are faster than MLX's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxlora_core.values import PackedProduct


@dataclass(frozen=True)
class LayerOperations:
    """What a transformer layer computes beside its products, in one pass through memory each.

    All arrays are float32 on the CPU, with 1 to 2**31 - 1 numbers; mlxlora never differentiates
    what comes. ``y`` and ``dy`` are used up: a result may take their memory.

    Attributes:
        silu_times: ``(gate, y)`` -> ``silu(gate) · y``.
        silu_slope: ``(gate, y)`` -> ``silu'(gate) · y``.
        normalise: ``(x, eps)`` -> ``x / sqrt(mean(x²) + eps)`` along the last axis.
        normalise_back: ``(x, dy, eps)`` -> the gradient of ``normalise`` for x.
        rotation: ``(cosines, sines)``, each (T, E), -> a function that turns neighbouring numbers of
            (..., T, E): ``x · cosines`` plus each one's neighbour times ``sines``.
        softmax_back: ``(e, dy)`` -> ``e (dy - sum(e · dy) / sum(e))`` along the last axis.
    """

    silu_times: Callable[[mx.array, mx.array], mx.array]
    silu_slope: Callable[[mx.array, mx.array], mx.array]
    normalise: Callable[[mx.array, float], mx.array]
    normalise_back: Callable[[mx.array, mx.array, float], mx.array]
    rotation: Callable[[mx.array, mx.array], Callable[[mx.array], mx.array]]
    softmax_back: Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class RuntimeStarted:
    """What a runtime has to say, in one line.

    Attributes:
        text: what is in force, or what went wrong.
        warning: whether the user should be told unasked.
        set_threads: sets how many threads each matrix product takes from now
            on, where the runtime can; mlxlora calls it between computations.
        exp: the exponential of a float32 array of any shape on the CPU, where the
            runtime has a faster one than MLX's; mlxlora never differentiates it.
        exp_rows: the same for ``(x, queries)`` -> ``exp(x - x.max(-1))`` along the last axis.
            ``queries`` is 0, or rows come in groups of so many, of which the last sees all
            numbers of its row, the one before all but one, and so on; the rest is 0.
        log_softmax: float32 (N, V) less the logarithm of the sum of the exponentials of each row.
        scaled_exp: ``factors · exp(x)`` of float32 (N, V) and (N, 1).
        layers: what a transformer layer computes beside its products.
        packed_product: makes, of the words, scales and biases of :func:`mlx.core.quantize` and
            its ``group_size`` and ``bits``, products with them in float32 that are faster than
            MLX on the CPU, or None where it cannot; mlxlora never differentiates them.
        set_precision: lets large matrix products of float32 be made of bfloat16 from now on:
            ``bfloat16`` rounds each number to one, ``bfloat16x3`` to the sum of two, and
            ``float32`` leaves it as it is. Raises a :class:`ResourceError` where that fails;
            mlxlora calls it between computations.
        advice: what would make it faster, in one line of ``mlxlora doctor``.
        alternatives: the libraries that it could use here, each as the environment variables
            of a process that uses it; none where there is no choice. ``mlxlora doctor`` alone
            calls it, and measures them.
        prefer: remembers one of them, the fastest, for the processes of this user that start later.
    """

    text: str
    warning: bool = False
    set_threads: Callable[[int], None] | None = None
    exp: Callable[[mx.array], mx.array] | None = None
    exp_rows: Callable[[mx.array, int], mx.array] | None = None
    log_softmax: Callable[[mx.array], mx.array] | None = None
    scaled_exp: Callable[[mx.array, mx.array], mx.array] | None = None
    layers: LayerOperations | None = None
    packed_product: Callable[..., PackedProduct | None] | None = None
    set_precision: Callable[[str], None] | None = None
    alternatives: Callable[[], Sequence[Mapping[str, str]]] | None = None
    prefer: Callable[[Mapping[str, str]], None] | None = None
    advice: str = ""
