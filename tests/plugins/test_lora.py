from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import lora_torch
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlxlora_affine import AffineOptions, mlxlora_quantizers
from mlxlora_lora import LoRAOptions, wrap
from mlxlora_lora.linear import LoRALinear

from mlxlora_core.errors import UsageError
from mlxlora_core.model.linears import QuantizedLinear, StackedLinear, dense_weight
from mlxlora_core.options import parse
from mlxlora_core.testing.stand_in import choice
from mlxlora_core.values import Place

WIDTHS = (64, 96, 32)
ROWS, RANK, SCALE = 7, 4, 3.0


def affine(linear: nn.Linear, bits: int) -> QuantizedLinear:
    (spec,) = mlxlora_quantizers()
    quantization = choice("quantizer", spec, AffineOptions(32, bits))
    parts = spec.quantize(linear.weight, quantization.options)
    assert parts is not None
    return QuantizedLinear(quantization, parts, linear.weight.shape, linear.get("bias"))


BASES: dict[str, Callable[[int, int], nn.Module]] = {
    "dense": lambda i, o: nn.Linear(i, o, bias=False),
    "dense with bias": lambda i, o: nn.Linear(i, o),
    "mlx 4 bits": lambda i, o: nn.QuantizedLinear.from_linear(nn.Linear(i, o, bias=False), 32, 4),
    "mlx 8 bits with bias": lambda i, o: nn.QuantizedLinear.from_linear(nn.Linear(i, o), 32, 8),
    "affine 4 bits": lambda i, o: affine(nn.Linear(i, o, bias=False), 4),
    "affine 8 bits with bias": lambda i, o: affine(nn.Linear(i, o), 8),
}


def numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def adapted(linear: nn.Module, rank: int = RANK, scale: float = SCALE) -> LoRALinear:
    """An adapter that has left its start."""
    module = LoRALinear.from_linear(linear, rank, scale)
    module.lora_b = mx.random.normal(module.lora_b.shape) * 0.1
    return module


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(0)


class TestGradients:
    @pytest.mark.parametrize("kind", BASES)
    @pytest.mark.parametrize("rows", [1, ROWS])
    def test_agree_with_torch(self, kind: str, rows: int) -> None:
        layers = [adapted(BASES[kind](i, o)) for i, o in pairwise(WIDTHS)]
        stack = nn.Sequential(layers[0], nn.SiLU(), layers[1])
        x, target = mx.random.normal((rows, WIDTHS[0])), mx.random.normal((rows, WIDTHS[-1]))

        def loss(parameters: dict[str, object], x: mx.array) -> mx.array:
            stack.update(parameters)
            return (stack(x) - target).square().mean()

        outputs = numpy(stack(x))
        value, (by_parameter, by_input) = mx.value_and_grad(loss, argnums=(0, 1))(
            stack.trainable_parameters(), x
        )
        want = lora_torch.gradients(
            [
                lora_torch.Layer(
                    numpy(dense_weight(layer.linear)),
                    numpy(layer.linear.bias) if "bias" in layer.linear else None,
                    numpy(layer.lora_a),
                    numpy(layer.lora_b),
                )
                for layer in layers
            ],
            SCALE,
            numpy(x),
            numpy(target),
        )
        found = dict(tree_flatten(by_parameter))
        names = [(f"layers.{n}.lora_a", f"layers.{n}.lora_b") for n in (0, 2)]
        assert set(found) == {name for pair in names for name in pair}
        np.testing.assert_allclose(outputs, want.outputs, atol=1e-4)
        assert float(value) == pytest.approx(want.loss, abs=1e-4)
        np.testing.assert_allclose(numpy(by_input), want.inputs, atol=1e-4)
        for (a, b), (want_a, want_b) in zip(names, want.layers, strict=True):
            np.testing.assert_allclose(numpy(found[a]), want_a, atol=1e-4)
            np.testing.assert_allclose(numpy(found[b]), want_b, atol=1e-4)
            assert np.abs(want_a).max() > 1e-3  # or agreeing to 1e-4 would say nothing
            assert np.abs(want_b).max() > 1e-3


class TestStart:
    def test_a_is_uniform_and_b_is_zero(self) -> None:
        module = LoRALinear.from_linear(nn.Linear(400, 80), rank=20)
        assert module.lora_a.shape == (400, 20)
        assert module.lora_b.shape == (20, 80)
        assert module.lora_a.dtype == module.lora_b.dtype == mx.float32
        assert not module.lora_b.any()
        a = np.sort(numpy(module.lora_a).ravel()) * 400**0.5
        # Kolmogorov-Smirnov against the uniform distribution on ±1, at 0.1 %.
        assert np.abs((a + 1) / 2 - np.arange(a.size) / a.size).max() < 1.95 / a.size**0.5

    def test_defaults(self) -> None:
        module = LoRALinear.from_linear(nn.Linear(16, 16))
        assert module.lora_a.shape == (16, 8)
        assert module.scale == 2.0
        assert LoRAOptions() == LoRAOptions(8, 2.0, 0.0)

    def test_options_reach_the_layer(self) -> None:
        module = wrap(
            nn.Linear(16, 16), Place("w", 0, (16, 16)), LoRAOptions(rank=3, scale=-0.5, dropout=0.25)
        )
        assert isinstance(module, LoRALinear)
        assert (module.lora_a.shape, module.scale) == ((16, 3), -0.5)
        assert "p=0.25" in repr(module.dropout)

    def test_half_precision_weights_leave_the_adapter_in_float32(self) -> None:
        linear = nn.Linear(32, 16)
        linear.set_dtype(mx.bfloat16)
        module = adapted(linear)
        assert module.lora_a.dtype == mx.float32
        assert module(mx.ones((1, 32), dtype=mx.bfloat16)).dtype == mx.bfloat16
        assert module(mx.ones((1, 32))).dtype == mx.float32

    def test_only_the_update_is_saved(self) -> None:
        module = LoRALinear.from_linear(affine(nn.Linear(64, 64), 4))
        assert set(dict(tree_flatten(module.trainable_parameters()))) == {"lora_a", "lora_b"}


class TestForward:
    def test_formula(self) -> None:
        module = adapted(nn.Linear(64, 32))
        x = mx.random.normal((2, 3, 64))
        wide = [numpy(p).astype(np.float64) for p in (x, module.linear.weight, module.lora_a, module.lora_b)]
        want = wide[0] @ wide[1].T + numpy(module.linear.bias) + SCALE * (wide[0] @ wide[2]) @ wide[3]
        np.testing.assert_allclose(numpy(module(x)), want, atol=1e-5)

    def test_dropout_acts_on_the_update_alone(self) -> None:
        module = LoRALinear.from_linear(nn.Linear(64, 64), dropout=0.5)
        x = mx.random.normal((5, 64))
        assert mx.array_equal(module(x), module.linear(x))  # the update is zero whatever it drops

    def test_dropout_keeps_the_mean_and_ends_with_training(self) -> None:
        module = LoRALinear.from_linear(nn.Linear(64, 8, bias=False), dropout=0.25)
        module.lora_b = mx.random.normal(module.lora_b.shape)
        x = mx.random.normal((1, 64))
        drawn = numpy(module(mx.broadcast_to(x, (20000, 64))))
        module.eval()
        want = numpy(module(x))[0]
        assert mx.array_equal(module(x), module(x))
        spread = drawn.std(axis=0)
        assert (spread > 0.01).all()
        assert (np.abs(drawn.mean(axis=0) - want) < 4.5 * spread / 20000**0.5).all()
        plain = adapted(nn.Linear(64, 8))
        assert mx.array_equal(plain(x), plain(x))


class TestFuse:
    @pytest.mark.parametrize("kind", BASES)
    def test_into_a_dense_linear(self, kind: str) -> None:
        module = adapted(BASES[kind](64, 96))
        dense = nn.Linear(64, 96, bias=False)
        dense.weight = module.fuse(dense_weight(module.linear))
        x = mx.random.normal((50, 64))
        bias = module.linear.bias if "bias" in module.linear else 0
        assert mx.abs(dense(x) + bias - module(x)).max() < 1e-4
        assert mx.abs(module(x) - module.linear(x)).max() > 0.1

    @pytest.mark.parametrize("bits", [4, 8])
    def test_into_a_quantized_linear_within_the_stated_bound(self, bits: int) -> None:
        """A step of the grid for every weight, weighted with the inputs: docs/kinds/adapters.md."""
        module = adapted(affine(nn.Linear(256, 128, bias=False), bits))
        dense = nn.Linear(256, 128, bias=False)
        dense.weight = module.fuse(dense_weight(module.linear))
        fused = affine(dense, bits)
        x = mx.random.normal((50, 256))
        by_group = mx.abs(x).reshape(50, -1, 32).sum(axis=-1)
        bound = by_group @ mx.abs(fused.scales).T + 1e-4
        away = mx.abs(fused(x) - module(x))
        assert (away <= bound).all()
        # The bound is for the worst case; roundings that go both ways cancel.
        relative = float(mx.linalg.norm(away) / mx.linalg.norm(module(x)))
        assert relative < {4: 0.1, 8: 0.006}[bits]


class TestRefusals:
    @pytest.mark.parametrize("rank", [0, -1, 9, 64])
    def test_rank_that_the_shape_cannot_have(self, rank: int) -> None:
        with pytest.raises(UsageError, match=rf"rank {rank} .* 8 outputs and 32 inputs, wanted 1 to 8"):
            LoRALinear.from_linear(nn.Linear(32, 8), rank)

    def test_rank_is_held_against_the_weights_and_not_the_words(self) -> None:
        packed = affine(nn.Linear(64, 64), 2)
        assert packed.weight.shape == (64, 4)
        assert LoRALinear.from_linear(packed, rank=64).lora_a.shape == (64, 64)

    def test_a_stack_of_linears_is_left_alone(self) -> None:
        assert wrap(StackedLinear(3, 16, 16), Place("w", 0, (3, 16, 16)), LoRAOptions()) is None

    def test_what_is_no_linear(self) -> None:
        with pytest.raises(TypeError, match="Embedding"):
            LoRALinear.from_linear(nn.Embedding(8, 8))

    @pytest.mark.parametrize(
        "values",
        [
            {"rank": 0},
            {"rank": 2.5},
            {"scale": 0},
            {"scale": "nan"},
            {"dropout": 1},
            {"dropout": -0.1},
            {"alpha": 16},
        ],
    )
    def test_options(self, values: dict[str, object]) -> None:
        with pytest.raises(UsageError, match=next(iter(values))):
            parse(LoRAOptions, values, owner="adapter 'lora'")
