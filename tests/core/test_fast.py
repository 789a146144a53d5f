"""The CPU's ways of computing give what MLX's plain operations give, and so do their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from mlxlora_core import fast
from mlxlora_core.layers import on_cpu

pytestmark = pytest.mark.skipif(not on_cpu(), reason="elsewhere these are MLX's own operations")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def value_and_gradients(function: Callable[..., mx.array], *arguments: Any) -> list[Any]:
    """The value and the gradient of a weighted sum of it, by every argument."""
    arrays = [mx.array(a) for a in arguments]
    value = function(*arrays)
    weights = mx.array(normal(*value.shape, seed=9))
    gradient = mx.grad(lambda *a: (function(*a) * weights).sum(), argnums=tuple(range(len(arrays))))
    gradients = gradient(*arrays)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [np.array(x) for x in (value, *gradients)]


def torch_gradients(function: Callable[..., torch.Tensor], *arguments: Any) -> list[Any]:
    """The same by torch in float64."""
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arguments]
    value = function(*tensors)
    (value * torch.tensor(normal(*value.shape, seed=9))).sum().backward()
    return [value.detach().numpy(), *(t.grad.numpy() for t in tensors if t.grad is not None)]


def agree(got: list[Any], want: list[Any], bound: float = 1e-5) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= bound * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_silu_times(scale: float) -> None:
    gate, up = normal(70, 80, scale=scale), normal(70, 80, seed=1)
    assert gate.size >= fast.LARGE
    want = torch_gradients(lambda g, u: torch.nn.functional.silu(g) * u, gate, up)
    agree(value_and_gradients(fast.silu_times, gate, up), want)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_softmax_with_masked_scores(scale: float) -> None:
    scores = normal(8, 16, 64, scale=scale)
    mask = np.tril(np.ones((16, 64), bool), 40)
    want = torch_gradients(
        lambda s: s.masked_fill(~torch.tensor(mask), -torch.inf).softmax(-1),
        scores,
    )
    got = value_and_gradients(lambda s: fast.softmax(mx.where(mx.array(mask), s, -mx.inf)), scores)
    agree(got, want)


@pytest.mark.parametrize("vocabulary", [64, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy(vocabulary: int, scale: float) -> None:
    logits = normal(80, vocabulary, scale=scale)
    targets = np.random.default_rng(1).integers(0, vocabulary, 80)

    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(x, torch.tensor(targets), reduction="sum")

    agree(
        value_and_gradients(lambda x: fast.cross_entropy(x, mx.array(targets)), logits),
        torch_gradients(reference, logits),
    )


@pytest.mark.parametrize("kind", ["causal", "window", "none", "cached"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(kind: str, kv_heads: int) -> None:
    length, seen = 24, 40 if kind == "cached" else 24
    queries, keys = normal(3, 4, length, 20), normal(3, kv_heads, seen, 20, seed=1)
    values = normal(3, kv_heads, seen, 20, seed=2)
    assert queries.size >= fast.LARGE
    place = np.arange(seen - length, seen)[:, None] - np.arange(seen)
    masks = {"window": (place >= 0) & (place < 7), "none": None}
    visible = masks.get(kind, place >= 0)
    mask = "causal" if kind in ("causal", "cached") else None if visible is None else mx.array(visible)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attended = None if visible is None else torch.tensor(visible)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attended, scale=0.2, enable_gqa=True)

    agree(
        value_and_gradients(lambda q, k, v: fast.attention(q, k, v, 0.2, mask), queries, keys, values),
        torch_gradients(reference, queries, keys, values),
    )


def test_small_and_half_precision_arrays_take_mlx_own_way() -> None:
    gate = mx.array(normal(3, 5))
    assert mx.allclose(fast.silu_times(gate, gate), nn.silu(gate) * gate, atol=1e-6)
    half = mx.array(normal(80, 80)).astype(mx.float16)
    assert fast.silu_times(half, half).dtype == mx.float16
