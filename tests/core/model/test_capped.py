"""Attention whose scores are capped, and its gradients, held against torch in float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxlora_core.model.ops import attention

SCALE = 0.4


def normal(*shape: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(arrays: list[torch.Tensor], seen: torch.Tensor, cap: float) -> torch.Tensor:
    queries, keys, values = arrays
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = cap * torch.tanh(queries @ keys.mT * SCALE / cap)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ values


@pytest.mark.parametrize("kind", ["none", "causal", "booleans", "numbers"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("length", "held"), [(1, 6), (5, 0), (5, 3), (40, 0)])
@pytest.mark.parametrize("cap", [0.7, 50.0])
def test_values_and_gradients(kind: str, kv_heads: int, length: int, held: int, cap: float) -> None:
    sizes = [(2, 4, length, 6), (2, kv_heads, held + length, 6), (2, kv_heads, held + length, 6)]
    arrays = [2 * normal(*shape, seed=i) for i, shape in enumerate(sizes)]
    key = np.arange(held + length)
    seen = key <= key[held:, None] if kind != "none" else np.ones((length, held + length), bool)
    if kind in ("booleans", "numbers"):
        seen = seen & (key > key[held:, None] - 3)
    added = mx.array(np.where(seen, 0.0, -np.inf).astype(np.float32))
    mask = {"none": None, "causal": "causal", "booleans": mx.array(seen), "numbers": added}[kind]
    weights = normal(*sizes[0], seed=7)

    def ours(*arrays: mx.array) -> mx.array:
        return (attention(*arrays, SCALE, mask, cap) * mx.array(weights)).sum()

    given = [mx.array(array) for array in arrays]
    tensors = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    want = exact(tensors, torch.tensor(seen), cap)
    (want * torch.tensor(weights)).sum().backward()
    got = [attention(*given, SCALE, mask, cap), *mx.grad(ours, argnums=(0, 1, 2))(*given)]
    grads = [tensor.grad for tensor in tensors]
    for array, tensor in zip(got, [want.detach(), *grads], strict=True):
        assert tensor is not None
        np.testing.assert_allclose(np.array(array), tensor.numpy(), atol=2e-5)


def test_scores_below_a_high_cap_are_those_without_one() -> None:
    arrays = [mx.array(normal(1, 2, 8, 4, seed=seed)) for seed in range(3)]
    plain = attention(*arrays, SCALE, "causal")
    np.testing.assert_allclose(np.array(attention(*arrays, SCALE, "causal", 1e5)), np.array(plain), atol=1e-5)
    assert float(mx.abs(attention(*arrays, SCALE, "causal", 0.1) - plain).max()) > 1e-2


def test_half_precision_stays_what_it_is_and_a_mask_that_does_not_fit_is_refused() -> None:
    arrays = [mx.array(normal(1, 2, 8, 4, seed=seed)).astype(mx.bfloat16) for seed in range(3)]
    assert attention(*arrays, SCALE, "causal", 2.0).dtype == mx.bfloat16
    with pytest.raises(ValueError, match="mask is"):
        attention(*arrays, SCALE, mx.ones((3, 3), mx.bool_), 2.0)
    none = attention(*arrays, SCALE, mx.zeros((8, 8), mx.bool_), 2.0)  # a query that sees none: the mean
    np.testing.assert_allclose(
        np.array(none.astype(mx.float32)),
        np.broadcast_to(np.array(arrays[2].astype(mx.float32)).mean(2, keepdims=True), (1, 2, 8, 4)),
        atol=1e-2,
    )
