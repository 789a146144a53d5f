"""The relatives of LoRA against their formulas in NumPy, in float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlxlora_lora import (
    LoRAPlusOptions,
    PiSSAOptions,
    RankStabilizedOptions,
    faster_second,
    wrap_dora,
    wrap_stabilized,
)
from mlxlora_lora.dora import DoRALinear
from mlxlora_lora.embedding import LoRAEmbedding
from mlxlora_lora.linear import LoRALinear
from mlxlora_lora.pissa import PiSSALinear

from mlxlora_core.errors import UsageError
from mlxlora_core.model.linears import StackedLinear, dense_weight
from mlxlora_core.options import parse
from mlxlora_core.values import Place

PLACE = Place("layers.0.attention.wq", 0, (48, 32))


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(0)


def bases() -> dict[str, nn.Module]:
    return {
        "dense": nn.Linear(32, 48, bias=False),
        "dense with bias": nn.Linear(32, 48),
        "4 bits with bias": nn.QuantizedLinear.from_linear(nn.Linear(32, 48), 32, 4),
    }


class TestRSLoRA:
    @pytest.mark.parametrize("rank", [1, 4, 16])
    def test_the_factor_is_alpha_over_the_root_of_the_rank(self, rank: int) -> None:
        module = wrap_stabilized(nn.Linear(32, 48), PLACE, RankStabilizedOptions(rank, 6.0))
        assert isinstance(module, LoRALinear)
        assert module.scale == pytest.approx(6.0 / rank**0.5)
        assert module.lora_a.shape == (32, rank)


class TestLoRAPlus:
    def test_only_the_second_matrix_learns_faster(self) -> None:
        assert LoRAPlusOptions().ratio == 16
        assert faster_second(LoRAPlusOptions(ratio=4.0)) == {"lora_b": 4.0}

    @pytest.mark.parametrize("ratio", [0, -1, "inf"])
    def test_ratios_that_cannot_be(self, ratio: object) -> None:
        with pytest.raises(UsageError, match="ratio"):
            parse(LoRAPlusOptions, {"ratio": ratio}, owner="adapter 'lora-plus'")


class TestEmbedding:
    def test_tokens_that_no_row_holds_keep_their_embedding(self) -> None:
        module = LoRAEmbedding(nn.Embedding(20, 8), (20, 8), 4, 2.0)
        tokens, target = mx.array([[3, 5, 3]]), mx.random.normal((1, 3, 8))
        before = wide(module.fuse(module.linear.weight))
        _, gradient = nn.value_and_grad(module, lambda: (module(tokens) - target).square().mean())()
        assert not np.array(gradient["lora_b"]).any()  # lora_a is zero at first
        module.lora_a = module.lora_a - 0.1 * gradient["lora_a"]
        after = wide(module.fuse(module.linear.weight))
        changed = np.abs(after - before).max(axis=1) > 1e-6
        assert set(np.flatnonzero(changed)) == {3, 5}

    def test_formula(self) -> None:
        module = LoRAEmbedding(nn.Embedding(20, 8), (20, 8), 4, 3.0)
        module.lora_a = mx.random.normal((20, 4))
        e, a, b = (wide(p) for p in (module.linear.weight, module.lora_a, module.lora_b))
        weight, x = e + 3.0 * a @ b, mx.random.normal((5, 8))
        tokens = mx.array([[0, 19], [7, 7]])
        np.testing.assert_allclose(wide(module(tokens)), weight[np.array(tokens)], atol=1e-5)
        np.testing.assert_allclose(wide(module.as_linear(x)), wide(x) @ weight.T, atol=1e-4)


class TestDoRA:
    @pytest.mark.parametrize("kind", list(bases()))
    def test_formula(self, kind: str) -> None:
        linear = bases()[kind]
        module = DoRALinear(linear, 4, 1.5, 0.0)
        np.testing.assert_allclose(
            wide(module.m), np.linalg.norm(wide(dense_weight(linear)), axis=1), rtol=1e-6
        )
        module.lora_b = mx.random.normal((4, 48))
        module.m = module.m + mx.random.uniform(0, 1, (48,))
        w, a, b = (wide(p) for p in (dense_weight(linear), module.lora_a, module.lora_b))
        v = w + 1.5 * (a @ b).T
        fused = wide(module.m)[:, None] / np.linalg.norm(v, axis=1, keepdims=True) * v
        x = mx.random.normal((2, 3, 32))
        want = wide(x) @ fused.T + (wide(linear.bias) if "bias" in linear else 0)
        np.testing.assert_allclose(wide(module(x)), want, atol=2e-5)
        np.testing.assert_allclose(wide(module.fuse(dense_weight(linear))), fused, atol=1e-6)

    def test_the_gradient_does_not_go_through_the_norm(self) -> None:
        module = DoRALinear(nn.Linear(32, 48, bias=False), 4, 1.5, 0.0)
        module.lora_b = mx.random.normal((4, 48))
        x, weights = mx.random.normal((6, 32)), mx.random.normal((6, 48))
        _, gradient = nn.value_and_grad(module, lambda: (module(x) * weights).sum())()
        w, a, b = (wide(p) for p in (module.linear.weight, module.lora_a, module.lora_b))
        ratio = wide(module.m) / np.linalg.norm(w + 1.5 * (a @ b).T, axis=1)
        want = 1.5 * (wide(x) @ a).T @ (wide(weights) * ratio)
        np.testing.assert_allclose(wide(gradient["lora_b"]), want, atol=1e-3)

    def test_a_row_of_zeros_stays_one(self) -> None:
        linear = nn.Linear(32, 48, bias=False)
        linear.weight[3] = 0.0
        module = DoRALinear(linear, 4, 1.5, 0.0)
        x = mx.random.normal((6, 32))
        assert mx.allclose(module(x), linear(x), atol=1e-6)
        assert not module.fuse(linear.weight)[3].any() and not mx.isnan(module.fuse(linear.weight)).any()

    def test_dropout_acts_on_the_update_alone(self) -> None:
        module = DoRALinear(nn.Linear(32, 48), 4, 1.5, 0.5)
        x = mx.random.normal((6, 32))
        assert mx.allclose(module(x), module.linear(x), atol=1e-6)  # the update is zero whatever it drops
        module.lora_b = mx.random.normal((4, 48))
        assert not mx.array_equal(module(x), module(x))

    def test_stacks_and_embeddings_are_left_alone(self) -> None:
        options: Any = parse(type(LoRAPlusOptions()), {}, owner="")
        assert wrap_dora(StackedLinear(3, 16, 16), Place("w", 0, (3, 16, 16)), options) is None
        assert wrap_dora(nn.Embedding(9, 8), Place("e", None, (9, 8), "embedding"), options) is None


class TestPiSSA:
    @pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
    @pytest.mark.parametrize("iterations", [0, 30])
    def test_it_begins_with_the_largest_singular_values(
        self, shape: tuple[int, int], iterations: int
    ) -> None:
        outputs, inputs = shape
        linear = nn.Linear(inputs, outputs)
        module = PiSSALinear(linear, 5, 1.5, iterations)
        module.initialise()
        u, s, vt = np.linalg.svd(wide(linear.weight), full_matrices=False)
        want = (u[:, :5] * s[:5]) @ vt[:5]
        np.testing.assert_allclose(1.5 * (wide(module.lora_a) @ wide(module.lora_b)).T, want, atol=2e-5)
        # Shared out evenly: both have the same singular values.
        for matrix in (module.lora_a, module.lora_b):
            values = np.linalg.svd(wide(matrix), compute_uv=False)
            np.testing.assert_allclose(values, np.sqrt(s[:5] / 1.5), rtol=1e-4)
        assert mx.array_equal(module.lora_a, module.lora_a0) and mx.array_equal(module.lora_b, module.lora_b0)
        assert set(module.trainable_parameters()) == {"linear", "lora_a", "lora_b"}

    @pytest.mark.parametrize("kind", list(bases()))
    def test_formula(self, kind: str) -> None:
        linear = bases()[kind]
        module = PiSSALinear(linear, 4, 0.5, 0)
        module.initialise()
        x = mx.random.normal((3, 32))
        assert mx.array_equal(module(x), linear(x))
        module.lora_a = module.lora_a + 0.1 * mx.random.normal((32, 4))
        module.lora_b = module.lora_b + 0.1 * mx.random.normal((4, 48))
        a, b, a0, b0 = (wide(getattr(module, f"lora_{end}")) for end in ("a", "b", "a0", "b0"))
        want = wide(linear(x)) + 0.5 * (wide(x) @ a @ b - wide(x) @ a0 @ b0)
        np.testing.assert_allclose(wide(module(x)), want, atol=1e-5)
        update = module.low_rank()
        assert update.a.shape == (32, 8) and update.b.shape == (8, 48)
        np.testing.assert_allclose(0.5 * wide(update.a) @ wide(update.b), 0.5 * (a @ b - a0 @ b0), atol=1e-5)

    def test_a_weight_of_a_lower_rank(self) -> None:
        linear = nn.Linear(32, 48)
        linear.weight = mx.random.normal((48, 2)) @ mx.random.normal((2, 32))
        module = PiSSALinear(linear, 6, 1.0, 0)
        module.initialise()
        assert not any(mx.isnan(p).any() for p in (module.lora_a, module.lora_b))
        assert mx.allclose((module.lora_a @ module.lora_b).T, linear.weight, atol=1e-4)

    def test_values_from_a_file_take_nothing_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(np.linalg, "eigh", lambda matrix: pytest.fail("a weight was taken apart"))
        PiSSALinear(nn.Linear(32, 48), 5, 1.0, 0)

    @pytest.mark.parametrize("values", [{"scale": 0}, {"scale": -1}, {"iterations": -1}, {"rank": 0}])
    def test_options(self, values: dict[str, object]) -> None:
        with pytest.raises(UsageError, match=next(iter(values))):
            parse(PiSSAOptions, values, owner="adapter 'pissa'")
