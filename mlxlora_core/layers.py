"""Linears as mlxlora sees them: dense ones of MLX, and quantized ones of any kind.

This is also the one place that knows how a CPU differs from a GPU: there the
compute type is float32 and a quantized weight is expanded before it multiplies.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

LARGEST_CACHE_BYTES = 4 * 2**30
#: environment variable of MLX: how wide a graph may be and still be ordered breadth first
ORDER_WIDTH = "MLX_BFS_MAX_WIDTH"


def on_cpu() -> bool:
    """Whether MLX computes on the CPU, where half precision and packed weights are slow."""
    return mx.default_device().type == mx.DeviceType.cpu


def on_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU."""
    return not on_cpu() and mx.cuda.is_available()


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The type to compute in for weights of type ``stored``: float32 on a CPU, else the same."""
    return mx.float32 if on_cpu() else stored


def prepare_cpu() -> None:
    """Set what the defaults of MLX's CPU backend have too low; before anything is computed.

    It keeps 32 MB of freed memory, and pages fresh from the system cost more
    than the arithmetic on them: adding two arrays of 33 MB takes 5 times as
    long. And it orders the operations of streams fairly only in graphs at most 20
    wide: in a wider one, as a training step is, the second stream waits for the first.
    """
    if on_cpu():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        mx.set_cache_limit(min(total // 8, LARGEST_CACHE_BYTES))
        os.environ.setdefault(ORDER_WIDTH, str(2**20))


class QuantizedLinear(nn.Module):
    """Base of what a quantizer makes: a linear layer with a packed weight, which does not train.

    A subclass needs :attr:`shape` and :meth:`dequantize`; the forward pass
    follows from them. It may override :meth:`__call__` with a faster kernel.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the weight."""
        raise NotImplementedError

    def dequantize(self) -> mx.array:
        """The weight (outputs, inputs), float32, as the packed bits have it."""
        raise NotImplementedError

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type of the inputs."""
        y = _times_expanded(x, self.dequantize)
        if "bias" in self:
            y = y + self.bias
        return y.astype(x.dtype)


class StoredLinear(nn.Linear):
    """A dense linear whose weight stays as it is stored, and is expanded for each product.

    It computes the same as one that was expanded when it was loaded, in less memory and more time.

    Args:
        linear: whose parameters it takes over.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.weight = linear.weight
        if "bias" in linear:
            self.bias = linear.bias

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type of the inputs."""
        y = _times_expanded(x, lambda: self.weight)
        if "bias" in self:
            y = y + self.bias
        return y.astype(x.dtype)


class StoredEmbedding(nn.Embedding):
    """An embedding that stays as it is stored; see :class:`StoredLinear`.

    Args:
        embedding: whose parameters it takes over.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.weight = embedding.weight

    def __call__(self, tokens: mx.array) -> mx.array:
        """Embeddings (..., D) of token ids (...), in the type to compute in."""
        rows: mx.array = self.weight[tokens]
        return rows.astype(compute_dtype(rows.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D), where the embedding is the output head too."""
        return _times_expanded(x, lambda: self.weight).astype(x.dtype)


def _times_expanded(x: mx.array, expand: Callable[[], mx.array]) -> mx.array:
    """``x @ weight.T`` with the weight (outputs, inputs) that ``expand`` gives, in the type to compute in."""

    def product(x: mx.array) -> mx.array:
        return x @ expand().astype(compute_dtype(x.dtype)).T

    # Expanded again for the gradient: kept from the forward pass, the
    # weights of all layers would stand in memory unpacked at once.
    y: mx.array = mx.checkpoint(product)(x)
    return y


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a dense or quantized linear that an adapter can wrap."""
    return isinstance(module, (nn.Linear, nn.QuantizedLinear, QuantizedLinear))


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a dense or quantized linear.

    Raises:
        TypeError: it is none.
    """
    if not is_linear(linear):
        raise TypeError(f"wanted a dense or quantized linear, got {type(linear).__name__}")
    if isinstance(linear, QuantizedLinear):
        return linear.shape
    outputs, columns = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        columns = columns * 32 // linear.bits
    return outputs, columns


def dense_weight(linear: nn.Module) -> mx.array:
    """The weight (outputs, inputs) of a dense or quantized linear, expanded.

    A dense one has the type that it is stored in, a quantized one float32, for
    a product ``scale * q`` in half precision rounds, and may overflow.
    """
    if isinstance(linear, QuantizedLinear):
        return linear.dequantize()
    if isinstance(linear, nn.QuantizedLinear):
        scales, biases = linear.scales, linear.biases
        if biases is not None:  # the affine mode; the others scale by powers of two
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(
            linear.weight,
            scales,
            biases,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
            dtype=mx.float32,
        )
    weight: mx.array = linear.weight
    return weight
