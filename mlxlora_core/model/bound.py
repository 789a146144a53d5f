"""Products of a few rows that a quantizer binds to parts that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlxlora_core.machine.device import on_cpu
from mlxlora_core.plugins import Choice

# So many rows at most multiply packed where a quantizer binds a product. 768 x 2048 at 4 bits on a CPU:
# 1 row takes 0.09 ms packed and 0.16 ms in float32, 8 rows 0.29 and 0.45, 32 rows 1.2 and 0.75.
_FEW_ROWS = 8


def are_few(x: mx.array, inputs: int) -> bool:
    """Whether ``x`` is so few rows (..., inputs) that a bound product pays."""
    return 0 < x.size <= _FEW_ROWS * inputs


class Bound:
    """The product that a quantizer binds to the parts of a weight, if it does.

    Args:
        quantization: the quantizer, and the options that the parts were made with.
        parts: of the weight, by their names.
    """

    def __init__(self, quantization: Choice, parts: Mapping[str, mx.array]) -> None:
        self._quantization, self._parts = quantization, parts
        bind = quantization.component.spec.bind
        multiply = None if bind is None else bind(parts, quantization.options)
        self._multiply = None if multiply is None else self._with_gradient(multiply)
        self._of_float32 = on_cpu()

    def product(self, x: mx.array) -> Callable[[mx.array], mx.array] | None:
        """What multiplies inputs such as ``x``, or None."""
        return None if self._of_float32 and x.dtype != mx.float32 else self._multiply

    def _with_gradient(self, multiply: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        """The product with its gradient by the expanded weight: the quantizer's own need not have one."""
        component, options = self._quantization.component, self._quantization.options

        def checked(x: mx.array) -> mx.array:
            return component.checked("bind", multiply(x), mx.array)

        product: Any = mx.custom_function(checked)

        def vjp(x: mx.array, dy: mx.array, _: mx.array) -> mx.array:
            weight: mx.array = component.spec.dequantize(self._parts, options)
            return (dy @ weight.astype(dy.dtype)).astype(x.dtype)

        product.vjp(vjp)
        return product  # type: ignore[no-any-return]  # MLX's functions are not annotated
