from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora_core.machine import device
from mlxlora_core.machine.device import compute_dtype
from mlxlora_core.model.linears import QuantizedLinear, dense_weight, is_linear, linear_shape


class Signs(QuantizedLinear):
    """One bit a weight, and a size a row: the least that a quantizer can do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.signs = linear.weight > 0
        self.sizes = mx.abs(linear.weight).mean(axis=1, keepdims=True)
        if "bias" in linear:
            self.bias = linear.bias

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.signs.shape
        return outputs, inputs

    def dequantize(self) -> mx.array:
        return mx.where(self.signs, self.sizes, -self.sizes)


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(0)


class TestQuantizedLinear:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
    def test_forward_and_gradient_follow_from_dequantize(self, bias: bool, shape: tuple[int, ...]) -> None:
        linear = Signs(nn.Linear(48, 16, bias=bias))
        x, towards = mx.random.normal((*shape, 48)), mx.random.normal((*shape, 16))
        weight = np.array(linear.dequantize(), dtype=np.float64)
        (got,), (slope,) = mx.vjp(linear, [x], [towards])
        want = np.array(x) @ weight.T + (np.array(linear.bias) if bias else 0)
        np.testing.assert_allclose(np.array(got), want, atol=1e-5)
        np.testing.assert_allclose(np.array(slope), np.array(towards) @ weight, atol=1e-5)

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    def test_outputs_have_the_type_of_the_inputs(self, dtype: mx.Dtype) -> None:
        assert Signs(nn.Linear(48, 16))(mx.ones((2, 48), dtype=dtype)).dtype == dtype

    def test_half_precision_is_computed_in_float32_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        linear = Signs(nn.Linear(2048, 4, bias=False))
        x = mx.random.normal((8, 2048)).astype(mx.float16)
        weight = linear.dequantize()
        monkeypatch.setattr(device, "on_cpu", lambda: True)
        want = (x.astype(mx.float32) @ weight.T).astype(mx.float16)
        assert mx.array_equal(linear(x), want)
        monkeypatch.setattr(device, "on_cpu", lambda: False)
        assert mx.abs(linear(x) - want).max() < 0.05

    def test_does_not_keep_expanded_weights_for_the_gradient(self) -> None:
        """A deep stack has few of its weights expanded at once, however deep it is."""
        count, width = 48, 256
        stack = [Signs(nn.Linear(width, width, bias=False)) for _ in range(count)]
        x = mx.random.normal((8, width))
        mx.eval([layer.parameters() for layer in stack], x)

        def total(x: mx.array) -> mx.array:
            for layer in stack:
                x = x + layer(x)
            return x.square().mean()

        expanded_bytes = width * width * 4
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(total)(x))
        assert mx.get_peak_memory() - before < count / 2 * expanded_bytes

    def test_is_a_base_only(self) -> None:
        with pytest.raises(NotImplementedError):
            _ = QuantizedLinear().shape
        with pytest.raises(NotImplementedError):
            QuantizedLinear().dequantize()


class TestLinears:
    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    def test_shape_of_a_quantized_one_is_in_weights(self, bits: int) -> None:
        linear = nn.QuantizedLinear(96, 8, bits=bits, group_size=32)
        assert linear_shape(linear) == (8, 96)
        assert dense_weight(linear).shape == (8, 96)

    def test_shape_of_others(self) -> None:
        assert linear_shape(nn.Linear(96, 8)) == (8, 96)
        assert linear_shape(Signs(nn.Linear(96, 8))) == (8, 96)
        with pytest.raises(TypeError, match="wanted a dense or quantized linear, got Embedding"):
            linear_shape(nn.Embedding(8, 96))

    def test_what_is_a_linear(self) -> None:
        dense = nn.Linear(64, 64)
        assert all(map(is_linear, (dense, nn.QuantizedLinear(64, 64), Signs(dense))))
        assert not any(map(is_linear, (nn.Embedding(64, 64), nn.QuantizedEmbedding(64, 64), nn.RMSNorm(64))))

    def test_dense_weight_is_the_weight(self) -> None:
        dense = nn.Linear(64, 8)
        dense.set_dtype(mx.float16)
        assert dense_weight(dense) is dense.weight
        signs = Signs(dense)
        assert mx.array_equal(dense_weight(signs), signs.dequantize())

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    def test_dense_weight_of_a_quantized_one_is_not_rounded(self, dtype: mx.Dtype) -> None:
        dense = nn.Linear(64, 8, bias=False)
        dense.set_dtype(dtype)
        linear = nn.QuantizedLinear.from_linear(dense, 32, 8)
        steps = np.array(linear.weight).view(np.uint8).astype(np.float64)
        scales, biases = (
            np.repeat(np.array(p.astype(mx.float32)), 32, axis=1) for p in (linear.scales, linear.biases)
        )
        got = dense_weight(linear)
        assert got.dtype == mx.float32
        np.testing.assert_allclose(np.array(got), scales * steps + biases, atol=1e-8, rtol=1e-6)

    @pytest.mark.parametrize(
        ("mode", "group", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
    )
    def test_dense_weight_of_other_modes_of_mlx(self, mode: str, group: int, bits: int) -> None:
        linear = nn.QuantizedLinear(64, 8, False, group, bits, mode=mode)
        assert linear_shape(linear) == (8, 64)
        x = mx.random.normal((3, 64))
        assert mx.abs(x @ dense_weight(linear).T - linear(x)).max() < 1e-5

    def test_parameters_of_a_base_are_found(self) -> None:
        linear = Signs(nn.Linear(64, 8))
        assert set(dict(tree_flatten(linear.parameters()))) == {"signs", "sizes", "bias"}


def test_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        monkeypatch.setattr(device, "on_cpu", lambda: True)
        assert compute_dtype(dtype) == mx.float32
        monkeypatch.setattr(device, "on_cpu", lambda: False)
        assert compute_dtype(dtype) == dtype


def test_streams_are_ordered_fairly_on_a_cpu_unless_the_user_has_said_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = mx.set_cache_limit(0)
    mx.set_cache_limit(before)
    try:
        for cpu, given, wanted in ((False, None, None), (True, "20", "20"), (True, None, str(2**20))):
            monkeypatch.setattr(device, "on_cpu", lambda cpu=cpu: cpu)
            monkeypatch.delenv(device.ORDER_WIDTH, raising=False)
            if given:
                monkeypatch.setenv(device.ORDER_WIDTH, given)
            device.prepare_cpu()
            assert os.environ.get(device.ORDER_WIDTH) == wanted
    finally:
        mx.set_cache_limit(before)
    library = next(Path(mx.__file__).parent.glob("lib/libmlx.*"))
    assert device.ORDER_WIDTH.encode() in library.read_bytes(), "MLX knows no such variable any more"


def test_freed_buffers_are_kept_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    large_bytes = 48 * 2**20
    before = mx.set_cache_limit(0)
    try:
        for cpu, kept in ((False, False), (True, True)):
            monkeypatch.setattr(device, "on_cpu", lambda cpu=cpu: cpu)
            device.prepare_cpu()
            mx.eval(mx.zeros((large_bytes // 4,)) + 1)
            assert (mx.get_cache_memory() >= large_bytes) == kept
    finally:
        mx.set_cache_limit(before)
