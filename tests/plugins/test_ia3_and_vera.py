"""IA3 and VeRA against their formulas in NumPy, in float64."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlxlora_ia3 import IA3Options
from mlxlora_ia3 import wrap as wrap_ia3
from mlxlora_ia3.linear import ScaledInputs, ScaledOutputs
from mlxlora_vera import VeRAOptions
from mlxlora_vera import wrap as wrap_vera
from mlxlora_vera.linear import VeRALinear

from mlxlora_core.errors import UsageError
from mlxlora_core.model.linears import StackedLinear
from mlxlora_core.options import parse
from mlxlora_core.values import Place


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(0)


class TestIA3:
    @pytest.mark.parametrize(
        ("name", "scales", "kind"),
        [
            ("wk", "auto", ScaledOutputs),
            ("w2", "auto", ScaledInputs),
            ("down_proj", "auto", ScaledInputs),
            ("w2", "outputs", ScaledOutputs),
            ("wv", "inputs", ScaledInputs),
        ],
    )
    def test_what_is_scaled(self, name: str, scales: str, kind: type) -> None:
        module = wrap_ia3(nn.Linear(8, 6), Place(f"layers.0.x.{name}", 0, (6, 8)), IA3Options(scales))
        assert type(module) is kind
        assert module.ia3_l.shape == ((8,) if kind is ScaledInputs else (6,))
        assert mx.array_equal(module.ia3_l, mx.ones_like(module.ia3_l))

    def test_formula(self) -> None:
        linear, x = nn.Linear(8, 6), mx.random.normal((3, 8))
        w, b = wide(linear.weight), wide(linear.bias)
        for module, size in ((ScaledOutputs(linear), 6), (ScaledInputs(linear), 8)):
            module.ia3_l = mx.random.normal((size,))
            scale = wide(module.ia3_l)
            want = scale * (wide(x) @ w.T + b) if size == 6 else (wide(x) * scale) @ w.T + b
            np.testing.assert_allclose(wide(module(x)), want, atol=1e-5)
            fused = wide(x) @ wide(module.fuse(linear.weight)).T + wide(module.fuse_bias(linear.bias))
            np.testing.assert_allclose(fused, want, atol=1e-5)

    def test_stacks_and_embeddings_are_left_alone(self) -> None:
        assert wrap_ia3(StackedLinear(3, 8, 8), Place("w", 0, (3, 8, 8)), IA3Options()) is None
        assert wrap_ia3(nn.Embedding(9, 8), Place("e", None, (9, 8), "embedding"), IA3Options()) is None


def vera(inputs: int, outputs: int, rank: int = 16, seed: int = 0) -> VeRALinear:
    return VeRALinear(nn.Linear(inputs, outputs), rank, 0.1, 0.0, seed)


class TestVeRA:
    def test_formula(self) -> None:
        module, x = vera(40, 24), mx.random.normal((3, 40))
        assert mx.array_equal(module.lambda_d, mx.full((16,), 0.1)) and not module.lambda_b.any()
        module.lambda_d, module.lambda_b = mx.random.normal((16,)), mx.random.normal((24,))
        w, a, b = (wide(p) for p in (module.linear.weight, module.vera_a, module.vera_b))
        d, scale, bias = (wide(p) for p in (module.lambda_d, module.lambda_b, module.linear.bias))
        want = wide(x) @ w.T + bias + scale * ((d * (wide(x) @ a)) @ b)
        np.testing.assert_allclose(wide(module(x)), want, atol=1e-4)
        fused = w + scale[:, None] * (a * d @ b).T
        np.testing.assert_allclose(wide(module.fuse(module.linear.weight)), fused, atol=1e-5)

    def test_projections_are_shared_by_shape_and_begin_alike(self) -> None:
        one, same, larger = vera(300, 600), vera(300, 600), vera(700, 900)
        assert one.vera_a is same.vera_a and one.vera_b is same.vera_b
        np.testing.assert_allclose(
            wide(one.vera_a) * 300**0.5, wide(larger.vera_a)[:300] * 700**0.5, rtol=1e-6
        )
        np.testing.assert_allclose(wide(one.vera_b), wide(larger.vera_b)[:, :600], rtol=1e-6)
        assert set(one.trainable_parameters()) == {"linear", "dropout", "lambda_d", "lambda_b"}

    def test_the_seed_of_projections_is_their_own(self) -> None:
        first = wide(vera(30, 20, 8, seed=3).vera_a)
        mx.random.seed(99)
        again = VeRALinear(nn.Linear(31, 20), 8, 0.1, 0.0, 3)
        np.testing.assert_allclose(wide(again.vera_a)[:30] * 31**0.5, first * 30**0.5, rtol=1e-6)
        assert not np.allclose(wide(vera(30, 20, 8, seed=4).vera_a), first)
        assert vera(30, 20, 8, seed=2**63 - 1).vera_a.shape == (30, 8)

    def test_projections_are_uniform(self) -> None:
        module = vera(1000, 1200, 32)
        for projection, edge in ((module.vera_a, (6 / 1000) ** 0.5), (module.vera_b, (6 / 32) ** 0.5)):
            values = np.sort(wide(projection).ravel()) / edge
            # Kolmogorov-Smirnov against the uniform distribution on ±1, at 0.1 %.
            assert (
                np.abs((values + 1) / 2 - np.arange(values.size) / values.size).max()
                < 1.95 / values.size**0.5
            )

    def test_dropout_acts_on_the_update_alone(self) -> None:
        module = VeRALinear(nn.Linear(40, 24), 8, 0.1, 0.5, 0)
        x = mx.random.normal((3, 40))
        assert mx.array_equal(module(x), module.linear(x))
        module.lambda_b = mx.ones((24,))
        assert not mx.array_equal(module(x), module(x))
        module.eval()
        assert mx.array_equal(module(x), module(x))

    def test_stacks_and_embeddings_are_left_alone(self) -> None:
        assert wrap_vera(StackedLinear(3, 8, 8), Place("w", 0, (3, 8, 8)), VeRAOptions()) is None
        assert wrap_vera(nn.Embedding(9, 8), Place("e", None, (9, 8), "embedding"), VeRAOptions()) is None

    @pytest.mark.parametrize(
        "values", [{"rank": 0}, {"d_initial": 0}, {"dropout": 1}, {"projection_seed": -1}]
    )
    def test_options(self, values: dict[str, object]) -> None:
        with pytest.raises(UsageError, match=next(iter(values))):
            parse(VeRAOptions, values, owner="adapter 'vera'")
