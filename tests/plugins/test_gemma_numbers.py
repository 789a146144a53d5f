"""The numbers of the gemma architecture in each type, and its gradients, held against numpy in float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gemma_numpy import Gemma
from mlx.utils import tree_flatten, tree_unflatten
from mlxlora_gemma import build, tables
from mlxlora_gemma.config import ModelArgs
from mlxlora_gemma.model import RMSNorm

SMALL = Gemma(
    dim=10,
    hidden=14,
    vocabulary=13,
    heads=4,
    kv_heads=2,
    width=6,
    scalar=20.0,
    windows=(3, None, 3),
    thetas=(10.0, 1000.0, 10.0),
    divisors=(1.0, 8.0, 1.0),
    cap=2.0,
    final_cap=1.5,
    head_norms=True,
)
ARGS = ModelArgs(
    model_type="gemma3_text",
    dim=10,
    n_layers=3,
    head_dim=6,
    hidden_dim=14,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=13,
    query_pre_attn_scalar=20.0,
    rope_theta=1000.0,
    rope_factor=8.0,
    sliding_rope_theta=10.0,
    sliding_window=3,
    window_layers=(0, 2),
    head_norms=True,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=1.5,
)
IDS = np.random.default_rng(1).integers(0, 13, (2, 9))


def random(seed: int) -> dict[str, np.ndarray]:
    """Numbers for each tensor of the checkpoint."""
    draw = np.random.default_rng(seed)
    return {
        name: draw.standard_normal(shape) * (0.3 if len(shape) == 1 else 1.2 / shape[-1] ** 0.5)
        for name, shape in SMALL.shapes().items()
    }


def ours(theirs: dict[str, np.ndarray]) -> list[tuple[str, mx.array]]:
    """The same numbers by our names and in our order of rows."""
    found = []
    for entry in tables.hf(ARGS):
        rows = slice(None) if entry.rows is None else list(entry.rows)
        found.append((entry.name, mx.array(theirs[entry.foreign][rows].astype(np.float32))))
    return found


def model(weights: dict[str, np.ndarray]) -> Any:
    made: Any = build(ARGS)
    made.update(tree_unflatten(ours(weights)))
    return made


def test_logits_are_those_of_numpy() -> None:
    weights = random(0)
    want = SMALL.logits(weights, IDS)
    got = np.array(model(weights)(mx.array(IDS)))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def nats(logits: np.ndarray) -> float:
    """Sum of the surprise at each next token."""
    chosen = np.take_along_axis(logits[:, :-1], IDS[:, 1:, None], -1)[..., 0]
    return float((np.log(np.exp(logits[:, :-1]).sum(-1)) - chosen).sum())


def test_gradients_are_the_slopes_of_numpy() -> None:
    """Of every parameter, along a direction of its own; the step in float64 is small enough to be exact."""
    weights = random(0)
    made = model(weights)

    def loss(model: Any) -> mx.array:
        logits = model(mx.array(IDS))[:, :-1]
        return nn.losses.cross_entropy(logits, mx.array(IDS[:, 1:]), reduction="sum")

    gradients = dict(tree_flatten(nn.value_and_grad(made, loss)(made)[1]))
    for name, way in random(1).items():
        step = 1e-6
        ends = [
            nats(SMALL.logits({**weights, name: weights[name] + sign * step * way}, IDS)) for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        entry = next(entry for entry in tables.hf(ARGS) if entry.foreign == name)
        rows = slice(None) if entry.rows is None else list(entry.rows)
        got = float((np.array(gradients[entry.name]) * way[rows]).sum())
        assert abs(got - slope) <= 2e-4 * max(abs(slope), 0.1), name


def test_norms_multiply_by_one_more_than_the_weight_in_float32() -> None:
    draw = np.random.default_rng(3)
    norm = RMSNorm(8, 1e-6)
    norm.weight = mx.array(draw.standard_normal(8) * 0.01).astype(mx.bfloat16)
    x = mx.array(draw.standard_normal((2, 8)).astype(np.float32))
    exact = np.array(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    exact = exact * (1 + np.array(norm.weight.astype(mx.float32), np.float64))
    np.testing.assert_allclose(np.array(norm(x)), exact, rtol=1e-6)
    assert norm(x.astype(mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("dtype", "factor", "want"),
    [
        (mx.float32, 10**0.5, mx.float32),
        (mx.bfloat16, 3.15625, mx.bfloat16),  # the bfloat16 next to 3.1623
        (mx.float16, 10**0.5, mx.float32),  # hidden states of Gemma leave the range of float16
    ],
)
def test_embeddings_are_scaled_in_their_own_type(dtype: mx.Dtype, factor: float, want: mx.Dtype) -> None:
    made = model(random(0))
    made.tok_embeddings.weight = made.tok_embeddings.weight.astype(dtype)
    ids = mx.array(IDS)
    got = made.embed(ids)
    plain = made.tok_embeddings.weight[ids].astype(mx.float32)
    assert got.dtype == want
    assert mx.array_equal(got, (plain * factor).astype(want)).item()


def test_the_cache_of_a_window_gives_what_the_whole_does() -> None:
    made = model(random(0))
    ids = mx.array(IDS)
    cache = made.make_cache()
    parts = [made(ids[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 6), (6, 9))]
    far = mx.abs(mx.concatenate(parts, axis=1) - made(ids)).max()
    assert float(far) <= 1e-5
