from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora_core.errors import PluginError
from mlxlora_core.machine import device
from mlxlora_core.model import bound_products, linears
from mlxlora_core.model.linears import (
    QuantizedLinear,
    StackedLinear,
    StoredStackedLinear,
    dense_weight,
    is_linear,
    is_packed,
    linear_shape,
)
from mlxlora_core.options import NoOptions
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.specs import Quantizer
from mlxlora_core.testing.stand_in import choice
from mlxlora_core.values import PackedProduct


def by_signs(weight: mx.array, options: NoOptions) -> dict[str, mx.array]:
    return {"signs": weight > 0, "sizes": mx.abs(weight).mean(axis=-1, keepdims=True)}


def from_signs(parts: Mapping[str, mx.array], options: NoOptions) -> mx.array:
    return mx.where(parts["signs"], parts["sizes"], -parts["sizes"])


#: one bit a weight, and a size a row: the least that a quantizer can do
SIGNS = Quantizer(
    name="signs", summary="s", parts=("signs", "sizes"), quantize=by_signs, dequantize=from_signs
)


def signs(linear: nn.Module, **functions: Any) -> QuantizedLinear:
    """A linear in signs; ``functions`` of the quantizer may be others."""
    spec = dataclasses.replace(SIGNS, **functions)
    parts = by_signs(linear.weight, NoOptions())
    quantization = choice("quantizer", spec, NoOptions())
    return QuantizedLinear(quantization, parts, linear.weight.shape, linear.get("bias"))


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(0)


class TestQuantizedLinear:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
    def test_forward_and_gradient_follow_from_dequantize(self, bias: bool, shape: tuple[int, ...]) -> None:
        linear = signs(nn.Linear(48, 16, bias=bias))
        x, towards = mx.random.normal((*shape, 48)), mx.random.normal((*shape, 16))
        weight = np.array(linear.dequantize(), dtype=np.float64)
        (got,), (slope,) = mx.vjp(linear, [x], [towards])
        want = np.array(x) @ weight.T + (np.array(linear.bias) if bias else 0)
        np.testing.assert_allclose(np.array(got), want, atol=1e-5)
        np.testing.assert_allclose(np.array(slope), np.array(towards) @ weight, atol=1e-5)

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    def test_outputs_have_the_type_of_the_inputs(self, dtype: mx.Dtype) -> None:
        assert signs(nn.Linear(48, 16))(mx.ones((2, 48), dtype=dtype)).dtype == dtype

    def test_half_precision_is_computed_in_float32_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        linear = signs(nn.Linear(2048, 4, bias=False))
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
        stack = [signs(nn.Linear(width, width, bias=False)) for _ in range(count)]
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

    def test_nothing_of_it_trains(self) -> None:
        linear = signs(nn.Linear(64, 8))
        assert dict(tree_flatten(linear.trainable_parameters())) == {}
        assert set(linear.parts) == {"signs", "sizes"}

    @pytest.mark.parametrize(
        ("cpu", "rows", "own"), [(True, 1, True), (True, 2, False), (False, 1, True), (False, 2, True)]
    )
    def test_the_quantizer_s_own_product_is_taken_where_it_pays(
        self, cpu: bool, rows: int, own: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def product(x: mx.array, parts: Mapping[str, mx.array], options: NoOptions) -> mx.array:
            asked.append(x.shape)
            return x @ from_signs(parts, options).T

        asked: list[tuple[int, ...]] = []
        linear = signs(nn.Linear(64, 8), matmul=product)
        monkeypatch.setattr(linears, "on_cpu", lambda: cpu)
        x = mx.random.normal((1, rows, 64))
        got = linear(x)
        assert bool(asked) == own
        assert mx.abs(got - (x @ linear.dequantize().T + linear.bias)).max() < 1e-5

    @pytest.mark.parametrize(
        ("rows", "most", "training", "cpu", "dtype", "bound"),
        [
            (1, 8, False, True, mx.float32, True),
            (8, 8, False, True, mx.float32, True),
            (9, 8, False, True, mx.float32, False),
            (9, None, False, True, mx.float32, True),
            (1, 8, True, True, mx.float32, False),
            (1, 8, False, False, mx.float32, True),
            (1, 8, False, False, mx.float16, True),
            (9, 8, False, False, mx.float32, False),
            (1, 8, False, True, mx.float16, False),
        ],
    )
    def test_a_bound_product_takes_as_many_rows_as_it_is_good_for(
        self,
        rows: int,
        most: int | None,
        training: bool,
        cpu: bool,
        dtype: mx.Dtype,
        bound: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def bind(parts: Mapping[str, mx.array], options: NoOptions) -> Any:
            weight = from_signs(parts, options)
            made.append(weight)
            return PackedProduct(lambda x: used.append(x) or x @ weight.T, most_rows=most)

        made: list[mx.array] = []
        used: list[mx.array] = []
        linear = signs(nn.Linear(64, 8), bind=bind)
        linear.train(training)
        monkeypatch.setattr(linears, "on_cpu", lambda: cpu)
        monkeypatch.setattr(bound_products, "on_cpu", lambda: cpu)
        x = mx.random.normal((1, rows, 64)).astype(dtype)
        for _ in range(2):
            near = 1e-5 if dtype == mx.float32 else 0.02
            assert mx.abs(linear(x) - (x @ linear.dequantize().T + linear.bias)).max() < near
        assert len(made) <= 1 and len(used) == 2 * bound

    def test_a_model_that_trains_takes_a_bound_product_with_its_gradient(self) -> None:
        def bind(parts: Mapping[str, mx.array], options: NoOptions) -> PackedProduct:
            weight = from_signs(parts, options)
            return PackedProduct(lambda x: x @ weight.T, lambda dy: back.append(dy) or dy @ weight)

        back: list[mx.array] = []
        linear = signs(nn.Linear(64, 8), bind=bind)
        x, dy = mx.random.normal((3, 5, 64)), mx.random.normal((3, 5, 8))
        slope = mx.grad(lambda x: (linear(x) * dy).sum())(x)
        assert back and mx.abs(slope - dy @ linear.dequantize()).max() < 1e-5

    def test_what_is_bound_is_products_or_the_quantizer_is_named(self) -> None:
        linear = signs(nn.Linear(64, 8), bind=lambda parts, options: lambda x: x)
        with pytest.raises(PluginError, match="signs: bind gives function, wanted PackedProduct"):
            linear(mx.ones((1, 64)))

    def test_other_parts_are_bound_anew(self) -> None:
        def bind(parts: Mapping[str, mx.array], options: NoOptions) -> PackedProduct:
            return PackedProduct(lambda x: x @ from_signs(parts, options).T)

        linear = signs(nn.Linear(64, 8), bind=bind)
        linear.eval()
        x = mx.random.normal((1, 64))
        linear(x)
        linear.update(by_signs(mx.random.normal((8, 64)), NoOptions()))
        assert mx.abs(linear(x) - (x @ linear.dequantize().T + linear.bias)).max() < 1e-5

    def test_where_nothing_is_bound_all_is_as_without(self) -> None:
        linear = signs(nn.Linear(64, 8), bind=lambda parts, options: None)
        linear.eval()
        x = mx.random.normal((1, 64))
        assert mx.abs(linear(x) - (x @ linear.dequantize().T + linear.bias)).max() < 1e-5

    def test_a_bound_product_of_another_shape_names_the_quantizer(self) -> None:
        linear = signs(
            nn.Linear(64, 8), bind=lambda parts, options: PackedProduct(lambda x: mx.zeros((1, 9)))
        )
        linear.eval()
        with pytest.raises(PluginError, match=r"signs: bind gives \(1, 9\), wanted \(1, 8\)"):
            linear(mx.ones((1, 64)))

    def test_a_product_of_another_shape_names_the_quantizer(self) -> None:
        linear = signs(nn.Linear(64, 8), matmul=lambda x, parts, options: mx.zeros((1, 9)))
        with pytest.raises(PluginError, match=r"signs: matmul gives \(1, 9\), wanted \(1, 8\)"):
            linear(mx.ones((1, 64)))
        linear = signs(nn.Linear(64, 8), matmul=lambda x, parts, options: [1])
        with pytest.raises(PluginError, match="signs: matmul gives list, wanted array"):
            linear(mx.ones((1, 64)))


class TestStackedLinear:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("kind", ["dense", "stored", "quantized"])
    @pytest.mark.parametrize(
        ("rows", "chosen"), [((5,), (5,)), ((2, 3, 1), (2, 3, 4)), ((2, 3, 4), (2, 3, 4)), ((1, 1), (3, 1))]
    )
    def test_each_row_takes_its_own(
        self, kind: str, bias: bool, rows: tuple[int, ...], chosen: tuple[int, ...]
    ) -> None:
        stack = StackedLinear(6, 48, 16, bias=bias)
        if bias:
            stack.bias = mx.random.normal((6, 16))
        module = {"dense": lambda s: s, "stored": StoredStackedLinear, "quantized": signs}[kind](stack)
        x, indices = mx.random.normal((*rows, 48)), mx.random.randint(0, 6, chosen)
        weight = np.array(dense_weight(module), dtype=np.float64)[np.array(indices)]  # (..., 16, 48)
        towards = mx.random.normal((*np.broadcast_shapes(rows, chosen), 16))
        (got,), (slope,) = mx.vjp(lambda x: module(x, indices), [x], [towards])
        want = np.einsum("...fd,...d->...f", weight, np.array(x))
        if bias:
            want = want + np.array(stack.bias)[np.array(indices)]
        np.testing.assert_allclose(np.array(got), want, atol=1e-5)
        back = np.einsum("...fd,...f->...d", weight, np.array(towards))
        for axis, (one, many) in enumerate(zip(rows, back.shape, strict=False)):
            if one != many:
                back = back.sum(axis=axis, keepdims=True)
        np.testing.assert_allclose(np.array(slope), back, atol=1e-4)

    def test_a_dense_one_trains(self) -> None:
        """The gradient of its weight: rows of inputs summed where they took an expert."""
        stack = StackedLinear(3, 8, 4)
        x, indices = mx.random.normal((10, 8)), mx.arange(10) % 2
        _, gradient = nn.value_and_grad(stack, lambda: stack(x, indices).sum())()
        sums = np.stack([np.array(x)[0::2].sum(0), np.array(x)[1::2].sum(0), np.zeros(8)])
        np.testing.assert_allclose(
            np.array(gradient["weight"]), np.repeat(sums[:, None], 4, axis=1), atol=1e-5
        )

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    def test_outputs_have_the_type_of_the_inputs(self, dtype: mx.Dtype) -> None:
        stack = StackedLinear(3, 8, 4)
        for module in (stack, StoredStackedLinear(stack), signs(stack)):
            assert module(mx.ones((2, 8), dtype=dtype), mx.array([0, 2])).dtype == dtype


class TestLinears:
    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    def test_shape_of_a_quantized_one_is_in_weights(self, bits: int) -> None:
        linear = nn.QuantizedLinear(96, 8, bits=bits, group_size=32)
        assert linear_shape(linear) == (8, 96)
        assert dense_weight(linear).shape == (8, 96)

    def test_shape_of_others(self) -> None:
        assert linear_shape(nn.Linear(96, 8)) == (8, 96)
        assert linear_shape(signs(nn.Linear(96, 8))) == (8, 96)
        assert linear_shape(StackedLinear(3, 96, 8)) == (3, 8, 96)
        with pytest.raises(TypeError, match="wanted a dense or quantized linear, got Embedding"):
            linear_shape(nn.Embedding(8, 96))

    def test_what_is_a_linear(self) -> None:
        dense = nn.Linear(64, 64)
        packed = (nn.QuantizedLinear(64, 64), signs(dense))
        assert all(map(is_linear, (dense, StackedLinear(2, 64, 64), *packed)))
        assert [is_packed(module) for module in (dense, StackedLinear(2, 64, 64), *packed)] == [0, 0, 1, 1]
        assert not any(map(is_linear, (nn.Embedding(64, 64), nn.QuantizedEmbedding(64, 64), nn.RMSNorm(64))))

    def test_dense_weight_is_the_weight(self) -> None:
        dense = nn.Linear(64, 8)
        dense.set_dtype(mx.float16)
        assert dense_weight(dense) is dense.weight
        packed = signs(dense)
        assert mx.array_equal(dense_weight(packed), packed.dequantize())

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
        linear = signs(nn.Linear(64, 8))
        assert set(dict(tree_flatten(linear.parameters()))) == {"signs", "sizes", "bias"}


@pytest.mark.parametrize("change", ["attribute", "update"])
def test_a_product_that_is_bound_to_parts_ends_with_them(
    registry: Registry, as_on_a_gpu: None, change: str
) -> None:
    affine = registry.find("quantizer", "affine")
    choice = Choice(affine, affine.spec.options(group_size=32, bits=4))
    weight = mx.random.normal((16, 64)).astype(mx.bfloat16)
    linear = QuantizedLinear(choice, affine.spec.quantize(weight, choice.options), weight.shape)
    linear.eval()
    x = mx.random.normal((3, 64)).astype(mx.bfloat16)
    before = linear(x)
    exact = x.astype(mx.float32) @ linear.dequantize().T
    assert before.dtype == mx.bfloat16 and mx.allclose(before.astype(mx.float32), exact, rtol=0.02, atol=0.3)
    twice = {"scales": 2 * linear.scales, "biases": 2 * linear.biases}
    if change == "update":
        linear.update(twice)
    else:
        linear.scales, linear.biases = twice["scales"], twice["biases"]
    assert mx.array_equal(linear(x), 2 * before)
