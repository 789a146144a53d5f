"""Weights packed by affine groups: ``w ≈ scale · q + bias``, one scale and bias a group."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlxlora_affine import AffineOptions
from mlxlora_affine.unpack import unpack
from mlxlora_core.api import ModelError, PackedProduct
from mlxlora_core.ops import on_cpu, on_cuda, packed_product

Parts = Mapping[str, mx.array]

#: rows from which CUDA multiplies by the expanded weight faster. An H100, 11008 x 4096 in 4 bits, bfloat16:
#: 64 rows take 0.17 ms packed and 0.21 ms expanded, 512 rows 0.51 and 0.24, 2048 rows 1.7 and 0.46.
CUDA_ROWS = 128

#: rows up to which a product needs no gradient: those of decoding
GPU_ROWS = 8


def pack(weight: mx.array, options: AffineOptions) -> dict[str, mx.array] | None:
    """``weight`` (..., outputs, inputs) in fewer bits, or None when its inputs do not divide by the group.

    A group is ``group_size`` neighbouring weights of one row, q an integer of
    ``bits`` bits. The parts are named and laid out as in ``mlx.nn.QuantizedLinear``:
    ``weight`` (..., outputs, inputs · bits / 32) uint32, ``scales`` and ``biases``
    (..., outputs, inputs / group_size) in the type of the weight.
    Source: Jacob et al. 2017, arXiv:1712.05877, eq. 1; the choice of scale and
    bias is that of ``mlx.core.quantize``.

    Raises:
        ModelError: weights that are not finite, or so large that their range is not.
    """
    if weight.shape[-1] % options.group_size:
        return None
    words, scales, biases = mx.quantize(weight, group_size=options.group_size, bits=options.bits)
    if not (mx.isfinite(weight).all() & mx.isfinite(scales).all()):
        raise ModelError(
            f"a weight of shape {weight.shape} cannot be quantized: it has values that are not "
            "finite, or too large for the range of a group to be"
        )
    return {"weight": words, "scales": scales, "biases": biases}


def expand(parts: Parts, options: AffineOptions) -> mx.array:
    """The weight (..., outputs, inputs), float32, as the packed bits have it.

    Raises:
        ModelError: parts that do not belong together.
    """
    _check(parts, options)
    words = parts["weight"]
    scales, biases = parts["scales"].astype(mx.float32), parts["biases"].astype(mx.float32)
    if not on_cpu():
        return mx.dequantize(words, scales, biases, group_size=options.group_size, bits=options.bits)
    steps = unpack(words.reshape(-1, words.shape[-1]), options.bits).astype(mx.float32)
    steps = steps.reshape(*scales.shape, options.group_size)
    return (steps * scales[..., None] + biases[..., None]).reshape(*words.shape[:-1], -1)


def multiply(x: mx.array, parts: Parts, options: AffineOptions) -> mx.array:
    """Outputs (..., outputs) of inputs (..., inputs) of one linear, packed where that is faster."""
    if x.size // x.shape[-1] >= CUDA_ROWS and on_cuda():

        def product(x: mx.array) -> mx.array:
            return x @ _expanded_as(x.dtype, parts, options).T

        y: mx.array = mx.checkpoint(product)(x)  # expanded again for the gradient
        return y
    return mx.quantized_matmul(
        x,
        parts["weight"],
        parts["scales"],
        parts["biases"],
        transpose=True,
        group_size=options.group_size,
        bits=options.bits,
    )


def bound(parts: Parts, options: AffineOptions) -> PackedProduct | None:
    """Products with the parts of one linear: on a GPU MLX's of a few rows, on a CPU what a runtime lends."""
    words, scales, biases = (parts[name] for name in ("weight", "scales", "biases"))
    group_size, bits = options.group_size, options.bits
    if on_cpu():
        return packed_product(words, scales, biases, group_size=group_size, bits=bits)

    def times(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, words, scales, biases, transpose=True, group_size=group_size, bits=bits)

    return PackedProduct(times, most_rows=GPU_ROWS)


def _expanded_as(dtype: mx.Dtype, parts: Parts, options: AffineOptions) -> mx.array:
    """The weight of one linear in another type, with no float32 of it in memory."""
    return mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts["biases"],
        group_size=options.group_size,
        bits=options.bits,
        dtype=dtype,
    )


def _check(parts: Parts, options: AffineOptions) -> None:
    """Refuse parts of which one is not as the others would have it."""
    words, scales, biases = (parts[name] for name in ("weight", "scales", "biases"))
    groups = (*words.shape[:-1], words.shape[-1] * 32 // options.bits // options.group_size)
    if words.dtype != mx.uint32 or not scales.shape == biases.shape == groups:
        raise ModelError(
            f"weight {words.shape} {words.dtype}, scales {scales.shape} and biases {biases.shape} do not "
            f"belong together at {options.bits} bits, {options.group_size} weights a group"
        )
