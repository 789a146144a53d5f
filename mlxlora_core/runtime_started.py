"""What a runtime hands over once it is started: words, and functions that are faster than MLX's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxlora_core.values import PackedProduct


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
        sigmoid: the same for 1 / (1 + exp(-x)).
        exp_rows: the same for ``(x, queries)`` -> ``exp(x - x.max(-1))`` along the last axis.
            ``queries`` is 0, or rows come in groups of so many, of which the last sees all
            numbers of its row, the one before all but one, and so on; the rest is 0.
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
    sigmoid: Callable[[mx.array], mx.array] | None = None
    exp_rows: Callable[[mx.array, int], mx.array] | None = None
    packed_product: Callable[..., PackedProduct | None] | None = None
    set_precision: Callable[[str], None] | None = None
    alternatives: Callable[[], Sequence[Mapping[str, str]]] | None = None
    prefer: Callable[[Mapping[str, str]], None] | None = None
    advice: str = ""
