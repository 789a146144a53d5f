"""Linears as mlxlora sees them: dense ones of MLX, and quantized ones of any kind.

This is also the one place that knows how a CPU differs from a GPU: there the
compute type is float32 and a quantized weight is expanded before it multiplies.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn


@cache
def on_cpu() -> bool:
    """Whether MLX computes on the CPU, where half precision and packed weights are slow."""
    return mx.default_device().type == mx.DeviceType.cpu


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The type to compute in for weights of type ``stored``: float32 on a CPU, else the same."""
    return mx.float32 if on_cpu() else stored


class QuantizedLinear(nn.Module):
    """Base of what a quantizer makes: a linear layer with a packed weight.

    A subclass needs :attr:`shape` and :meth:`dequantize`; the forward pass
    follows from them. It may override :meth:`__call__` with a faster kernel.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the weight."""
        raise NotImplementedError

    def dequantize(self) -> mx.array:
        """The weight (outputs, inputs) as the packed bits have it."""
        raise NotImplementedError

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs)."""
        y = x @ self.dequantize().T.astype(x.dtype)
        return y + self.bias if "bias" in self else y


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a dense or quantized linear that an adapter can wrap."""
    return isinstance(module, (nn.Linear, nn.QuantizedLinear, QuantizedLinear))


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a dense or quantized linear."""
    if isinstance(linear, QuantizedLinear):
        return linear.shape
    outputs, columns = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        columns = columns * 32 // linear.bits
    return outputs, columns


def dense_weight(linear: nn.Module) -> mx.array:
    """The weight (outputs, inputs) of a dense or quantized linear, expanded."""
    if isinstance(linear, QuantizedLinear):
        return linear.dequantize()
    if isinstance(linear, nn.QuantizedLinear):
        return mx.dequantize(
            linear.weight,
            linear.scales,
            linear.biases,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    weight: mx.array = linear.weight
    return weight
