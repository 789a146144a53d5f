"""The conformance suite over every architecture that is registered."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import llama_torch
import mlx.core as mx
import mlxlora_llama.model
import numpy as np
import pytest
import torch

from mlxlora_core import plugins as registry
from mlxlora_core.api import LazyTensor, option
from mlxlora_core.model.ops import LARGE
from mlxlora_core.testing.architecture import ArchitectureSuite

ARCHITECTURES = {
    c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("architecture")
}


LLAMA = {
    "dim": 12,
    "n_layers": 2,
    "head_dim": 4,
    "hidden_dim": 20,
    "n_heads": 3,
    "n_kv_heads": 3,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "vocab_size": 17,
}
TIED = {**LLAMA, "n_kv_heads": 1}
MISTRAL = {
    **LLAMA,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 6,
    "sliding_window": 4,
    "rope_theta": 1e6,
    "max_seq_len": 4096,
}


class TestLlama(ArchitectureSuite):
    """An own head, as many key heads as query heads, and rotary frequencies in the checkpoint."""

    spec = ARCHITECTURES["llama"]
    raw = LLAMA
    checkpoint = llama_torch.shapes(LLAMA) | {"rope.freqs": (2,)}
    unused = frozenset({"rope.freqs"})
    sizes = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size")

    def reference(self, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        tensors = {n: torch.from_numpy(w) for n, w in weights.items() if n not in self.unused}
        return llama_torch.logits(tensors, torch.from_numpy(tokens).long(), self.raw).numpy()


class TestTiedLlama(TestLlama):
    """No output matrix, and one key head for all queries."""

    raw = TIED
    unused = frozenset()
    checkpoint = llama_torch.shapes(TIED, tied=True)


class TestMistral(TestLlama):
    """Grouped queries, heads not D / H wide, a window shorter than the input, a stated context."""

    raw = MISTRAL
    unused = frozenset()
    checkpoint = llama_torch.shapes(MISTRAL)
    sizes = (*TestLlama.sizes, "sliding_window", "max_seq_len")


def documented() -> Any:
    """The architecture that the page shows."""
    page = (Path(__file__).parents[2] / "docs" / "kinds" / "architectures.md").read_text()
    code = next(c for c in page.split("```python\n")[1:] if "def projection" in c)
    module = types.ModuleType("fused")
    sys.modules["fused"] = module  # dataclasses look their module up by name
    names = vars(module)
    exec(code.split("```")[0], names)
    return names["mlxlora_architectures"]()[0]


class TestShown(ArchitectureSuite):
    """The architecture on the page: a fused projection with a bias, halves turned against each other."""

    spec = documented()
    raw: Mapping[str, Any] = {"model_type": "fused", "d_model": 24, "num_layers": 2, "num_heads": 3}
    checkpoint: Mapping[str, tuple[int, ...]] = {
        "embed.weight": (11, 24),
        "head.weight": (11, 24),
        "head.bias": (11,),
        **{f"layers.{i}.qkv.weight": (72, 24) for i in range(2)},
        **{f"layers.{i}.qkv.bias": (72,) for i in range(2)},
        **{f"layers.{i}.wo.weight": (24, 24) for i in range(2)},
        **{f"layers.{i}.norm.weight": (24,) for i in range(2)},
    }
    sizes = ("d_model", "num_layers", "num_heads")

    def reference(self, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        """In float64 with numpy, the halves of a head turned as the checkpoint has them."""
        w = {name: weight.astype(np.float64) for name, weight in weights.items()}
        x, (_, length) = w["embed.weight"][tokens], tokens.shape
        angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(4) / 4)  # (T, features / 2)
        cos, sin = np.cos(angles), np.sin(angles)
        for i in range(2):
            normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"layers.{i}.norm.weight"]
            fused = normed @ w[f"layers.{i}.qkv.weight"].T + w[f"layers.{i}.qkv.bias"]
            q, k, v = (p.reshape(*p.shape[:2], 3, 8).swapaxes(1, 2) for p in np.split(fused, 3, axis=-1))
            q, k = (
                np.concatenate([p[..., :4] * cos - p[..., 4:] * sin, p[..., 4:] * cos + p[..., :4] * sin], -1)
                for p in (q, k)
            )
            scores = q @ k.swapaxes(-1, -2) / 8**0.5
            scores[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out = (shares / shares.sum(-1, keepdims=True)) @ v
            x = x + out.swapaxes(1, 2).reshape(x.shape) @ w[f"layers.{i}.wo.weight"].T
        return x @ w["head.weight"].T + w["head.bias"]


def test_every_architecture_is_covered() -> None:
    assert {TestLlama.spec.name} == set(ARCHITECTURES)


# --- the suite fails what is broken ---------------------------------------------


def careless(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> mx.array:
    """Attention that takes a mask of numbers to add for one of booleans once its inputs are large."""
    length, seen = queries.shape[2], keys.shape[2]
    if mask == "causal":
        key = mx.arange(seen)
        mask = mx.where(key <= key[-length:, None], 0.0, -math.inf)
    if mask is not None and queries.size >= LARGE:
        mask = mx.where(mask != 0, 0.0, -math.inf)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def broken(**changes: Any) -> ArchitectureSuite:
    """The suite of Llama over an architecture with other functions."""
    suite = TestLlama()
    suite.spec = replace(TestLlama.spec, **changes)
    return suite


def test_attention_that_is_right_at_small_sizes_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlxlora_llama.model, "attention", careless)
    suite = TestLlama()
    suite.test_agrees_with_the_reference(large=False)
    suite.test_is_causal()
    for test in (
        suite.test_large_logits_and_gradients_are_finite,
        suite.test_large_is_causal,
        suite.test_large_decoding_is_the_full_forward,
        partial(suite.test_agrees_with_the_reference, large=True),
    ):
        with pytest.raises(AssertionError):
            test()


def test_a_gradient_that_is_wrong_at_large_sizes_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        scale = mx.rsqrt(x.square().mean(-1, keepdims=True) + eps)
        return x * (mx.stop_gradient(scale) if x.size > LARGE else scale) * weight

    monkeypatch.setattr(mlxlora_llama.model, "rms_norm", norm)
    suite = TestLlama()
    suite.test_agrees_with_the_reference(large=True)
    with pytest.raises(AssertionError, match="the slope is"):
        suite.test_large_gradient_is_the_slope()


def test_a_tensor_that_is_lost_read_or_made_up_fails() -> None:
    def lost(found: Mapping[str, LazyTensor], args: Any) -> Mapping[str, LazyTensor]:
        return {
            name.replace("w3", "w1"): tensor for name, tensor in mlxlora_llama.tensors(found, args).items()
        }

    with pytest.raises(AssertionError):
        broken(tensors=lost).test_no_tensor_is_lost()
    with pytest.raises(AssertionError):
        broken(tensors=lost).test_tensors_are_the_parameters()

    def eager(found: Mapping[str, LazyTensor], args: Any) -> Mapping[str, LazyTensor]:
        made = {name: (tensor, tensor.read()) for name, tensor in mlxlora_llama.tensors(found, args).items()}
        return {name: LazyTensor(t.shape, t.dtype, lambda v=v: v) for name, (t, v) in made.items()}

    with pytest.raises(AssertionError, match="tensors\\(\\) reads"):
        broken(tensors=eager).test_tensors_are_the_parameters()

    def known_alone(found: Mapping[str, LazyTensor], args: Any) -> Mapping[str, LazyTensor]:
        return {name: tensor for name, tensor in found.items() if not name.startswith("no.")}

    with pytest.raises(AssertionError):
        broken(tensors=known_alone).test_unknown_names_pass()


def test_args_without_bounds_and_a_config_of_anything_fail() -> None:
    @dataclass(frozen=True)
    class Args:
        model_type: str = option("llama", help="kind")
        dim: int = option(12, help="width")

    loose = broken(args=Args, read=lambda raw, shapes: Args())
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        loose.test_every_number_is_bounded()
    with pytest.raises(AssertionError):
        loose.test_knows_its_own_configs_alone()
