"""Matrix products that a quantizer provides for a packed weight, with their gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlxlora_core.machine.device import on_cpu
from mlxlora_core.plugins import Choice
from mlxlora_core.values import PackedProduct


class BoundProduct:
    """What a quantizer binds to the parts of a weight (outputs, inputs), if anything.

    Args:
        quantization: the quantizer, and the options that the parts were made with.
        parts: of the weight, by their names.
        inputs: of the weight.
    """

    def __init__(self, quantization: Choice, parts: Mapping[str, mx.array], inputs: int) -> None:
        self._quantization, self._parts, self._inputs = quantization, parts, inputs
        bind = quantization.component.spec.bind
        given = None if bind is None else bind(parts, quantization.options)
        self._given = None if given is None else self._checked(given, PackedProduct)
        self._multiply = None if self._given is None else self._with_gradient(self._given)
        self._of_float32 = on_cpu()

    @property
    def for_all(self) -> bool:
        """Whether there is a product for any number of rows, with its gradient."""
        given = self._given
        return given is not None and given.most_rows is None and given.times_back is not None

    def product(self, x: mx.array, training: bool) -> Callable[[mx.array], mx.array] | None:
        """What multiplies inputs such as ``x`` (..., inputs), with a fast gradient if asked for, or None."""
        if self._given is None or (self._of_float32 and x.dtype != mx.float32):
            return None
        most = self._given.most_rows
        takes = x.size > 0 and (most is None or x.size <= most * self._inputs)
        return self._multiply if takes and (self._given.times_back or not training) else None

    def _with_gradient(self, given: PackedProduct) -> Callable[[mx.array], mx.array]:
        """The product with its gradient, where there is no other by the expanded weight."""
        spec, options = self._quantization.component.spec, self._quantization.options
        product: Any = mx.custom_function(lambda x: self._checked(given.times(x), mx.array))

        def vjp(x: mx.array, dy: mx.array, _: mx.array) -> mx.array:
            if given.times_back is not None:
                back: mx.array = self._checked(given.times_back(dy), mx.array)
                return back
            weight: mx.array = spec.dequantize(self._parts, options)
            return (dy @ weight.astype(dy.dtype)).astype(x.dtype)

        product.vjp(vjp)
        return product  # type: ignore[no-any-return]  # MLX's functions are not annotated

    def _checked(self, value: Any, wanted: type[Any]) -> Any:
        return self._quantization.component.checked("bind", value, wanted)
