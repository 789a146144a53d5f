"""A linear layer whose weight is packed by affine groups."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxlora_affine.unpack import unpack
from mlxlora_core.api import ModelError
from mlxlora_core.ops import QuantizedLinear, on_cpu, on_cuda

#: rows from which CUDA multiplies by the expanded weight faster. An H100, 11008 x 4096 in 4 bits, bfloat16:
#: 64 rows take 0.17 ms packed and 0.21 ms expanded, 512 rows 0.51 and 0.24, 2048 rows 1.7 and 0.46.
CUDA_ROWS = 128


class AffineLinear(QuantizedLinear):
    """A linear whose weights are ``w ≈ scale · q + bias`` with one scale and bias a group.

    A group is ``group_size`` neighbouring weights of one row, q an integer of
    ``bits`` bits. Parameters are named and laid out as in
    ``mlx.nn.QuantizedLinear``: ``weight`` (outputs, inputs · bits / 32) uint32,
    ``scales`` and ``biases`` (outputs, inputs / group_size), ``bias`` (outputs,).
    Source: Jacob et al. 2017, arXiv:1712.05877, eq. 1; the choice of scale and
    bias is that of ``mlx.core.quantize``.

    Args:
        shape: (outputs, inputs).
        bias: whether there is a bias beside the weight.
        group_size: weights that share a scale and a bias; divides the inputs.
        bits: bits a weight.
    """

    def __init__(self, shape: tuple[int, int], bias: bool, group_size: int, bits: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        outputs, inputs = shape
        self.group_size = group_size
        self.bits = bits
        self.weight = mx.zeros((outputs, inputs * bits // 32), dtype=mx.uint32)
        self.scales = mx.zeros((outputs, inputs // group_size))
        self.biases = mx.zeros((outputs, inputs // group_size))
        if bias:
            self.bias = mx.zeros((outputs,))
        self.freeze()

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int, bits: int) -> AffineLinear | None:
        """``linear`` in fewer bits, or None when its inputs do not divide by the group.

        Raises:
            ModelError: weights that are not finite, or so large that their range is not.
        """
        outputs, inputs = linear.weight.shape
        if inputs % group_size:
            return None
        packed = cls((outputs, inputs), "bias" in linear, group_size, bits)
        packed.weight, packed.scales, packed.biases = mx.quantize(
            linear.weight, group_size=group_size, bits=bits
        )
        if not (mx.isfinite(linear.weight).all() & mx.isfinite(packed.scales).all()):
            raise ModelError(
                f"a weight of shape ({outputs}, {inputs}) cannot be quantized: it has values that are not "
                "finite, or too large for the range of a group to be"
            )
        if "bias" in linear:
            packed.bias = linear.bias
        packed.freeze()
        return packed

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the weight."""
        outputs, words = self.weight.shape
        return outputs, words * 32 // self.bits

    def dequantize(self) -> mx.array:
        """The weight (outputs, inputs), float32, as the packed bits have it."""
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        if not on_cpu():
            return mx.dequantize(self.weight, scales, biases, group_size=self.group_size, bits=self.bits)
        outputs, inputs = self.shape
        steps = unpack(self.weight, self.bits).astype(mx.float32).reshape(outputs, -1, self.group_size)
        return (steps * scales[..., None] + biases[..., None]).reshape(outputs, inputs)

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs (..., outputs) of inputs (..., inputs), in the type of the inputs."""
        rows = x.size // x.shape[-1]
        if on_cpu() and rows > 1:
            # 2048 x 2048 at 4 bits: one row takes 3.7 ms packed and 7 ms expanded, 8 rows 29 and 8 ms.
            return super().__call__(x)
        if rows >= CUDA_ROWS and on_cuda():
            y: mx.array = mx.checkpoint(self._times_expanded)(x)
        else:
            y = mx.quantized_matmul(
                x,
                self.weight,
                self.scales,
                self.biases,
                transpose=True,
                group_size=self.group_size,
                bits=self.bits,
            )
        if "bias" in self:
            y = y + self.bias
        return y.astype(x.dtype)

    def _times_expanded(self, x: mx.array) -> mx.array:
        """The product with the weight expanded in the type of ``x``, with no float32 of it in memory."""
        weight = mx.dequantize(
            self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits, dtype=x.dtype
        )
        return x @ weight.T

    def _extra_repr(self) -> str:
        outputs, inputs = self.shape
        return f"inputs={inputs}, outputs={outputs}, group_size={self.group_size}, bits={self.bits}"
