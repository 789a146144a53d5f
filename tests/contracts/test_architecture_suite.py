"""The conformance suite over every architecture that is registered."""

from __future__ import annotations

import math
import re
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
from mlxlora_core.api import ForeignTensor, LazyTensor, option
from mlxlora_core.model import layers, ops
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
    sizes = (*TestLlama.sizes, "max_seq_len")  # a window may be a list, one for each layer


def in_neighbours(weight: np.ndarray, heads: int) -> torch.Tensor:
    """The rows of queries or keys, halves of a head against each other, as neighbouring pairs."""
    split = torch.from_numpy(weight).unflatten(0, (heads, 2, -1))
    return split.swapaxes(1, 2).flatten(0, 2).contiguous()


class TestQwen3(ArchitectureSuite):
    """As Hugging Face spells it: norms of heads, biases, YaRN, a window in the upper layers, a tied head."""

    spec = ARCHITECTURES["llama"]
    layout = "hf"
    raw: Mapping[str, Any] = {
        "model_type": "qwen3",
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 17,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 2.0,
        },
    }
    ours: Mapping[str, Any] = {
        **LLAMA,
        "n_layers": 3,
        "head_dim": 8,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_norms": True,
        "biases": ("wq", "wk", "wv", "wo"),
        "sliding_window": 5,
        "window_layers": (1, 2),
        "rope_theta": 100.0,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original_len": 8,
        "rope_beta_fast": 2.0,
        "rope_beta_slow": 1.0,
        "rope_attention_factor": 0.1 * math.log(4) + 1,
    }
    names: Mapping[str, str] = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "model.layers.": "layers.",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    turned: Mapping[str, int] = {"wq": 4, "wk": 2, "q_norm": 1, "k_norm": 1}
    sizes = (
        "hidden_size",
        "num_hidden_layers",
        "head_dim",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "sliding_window",
    )

    @property
    def checkpoint(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]  # a field there
        shapes = llama_torch.shapes(self.ours, tied=True)
        theirs = {ours: theirs for theirs, ours in self.names.items()}
        found = {}
        for name, shape in shapes.items():
            place, _, part = name.rpartition(".")
            layer = re.match(r"layers\.\d+\.", place)
            front = theirs["layers."] + layer[0].removeprefix("layers.") if layer else ""
            found[f"{front}{theirs[place[layer.end() if layer else 0 :]]}.{part}"] = shape
        return found

    def reference(self, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
        named = {}
        for name, weight in weights.items():
            for theirs, ours in self.names.items():
                name = name.replace(theirs, ours)
            heads = self.turned.get(name.split(".")[-2])
            named[name] = in_neighbours(weight, heads) if heads else torch.from_numpy(weight)
        return llama_torch.logits(named, torch.from_numpy(tokens).long(), self.ours).numpy()


class TestSmolLM3(TestQwen3):
    """As GGUF spells it: the fourth layer without positions, divisors of the others' frequencies."""

    layout = "gguf"
    unsaid = ("gguf",)  # llama.cpp leaves the divisors of this family aside
    raw: Mapping[str, Any] = {
        "general.architecture": "smollm3",
        "smollm3.embedding_length": 32,
        "smollm3.block_count": 4,
        "smollm3.feed_forward_length": 20,
        "smollm3.attention.head_count": 4,
        "smollm3.attention.head_count_kv": 2,
        "smollm3.attention.key_length": 8,
        "smollm3.attention.layer_norm_rms_epsilon": 1e-5,
        "smollm3.rope.freq_base": 100.0,
        "rope_freqs.weight": [1.0, 1.5, 4.0, 8.0],
    }
    ours: Mapping[str, Any] = {
        **LLAMA,
        "dim": 32,
        "n_layers": 4,
        "head_dim": 8,
        "n_heads": 4,
        "n_kv_heads": 2,
        "unrotated_layers": (3,),
        "rope_theta": 100.0,
        "rope_scaling": "divisors",
        "rope_divisors": (1.0, 1.5, 4.0, 8.0),
    }
    names: Mapping[str, str] = {
        "token_embd": "tok_embeddings",
        "output_norm": "norm",
        "blk.": "layers.",
        "attn_norm": "attention_norm",
        "ffn_norm": "ffn_norm",
        "attn_q": "attention.wq",
        "attn_k": "attention.wk",
        "attn_v": "attention.wv",
        "attn_output": "attention.wo",
        "ffn_gate": "feed_forward.w1",
        "ffn_down": "feed_forward.w2",
        "ffn_up": "feed_forward.w3",
    }
    turned: Mapping[str, int] = {}
    sizes = (
        "smollm3.embedding_length",
        "smollm3.block_count",
        "smollm3.feed_forward_length",
        "smollm3.attention.head_count_kv",
        "smollm3.attention.key_length",
    )


class TestQwen2(TestSmolLM3):
    """As GGUF spells it: biases of queries, keys and values, whose halves are turned against each other."""

    raw: Mapping[str, Any] = {
        key.replace("smollm3", "qwen2"): "qwen2" if value == "smollm3" else value
        for key, value in TestSmolLM3.raw.items()
        if key not in ("rope_freqs.weight", "smollm3.attention.key_length")
    }
    ours: Mapping[str, Any] = {
        **LLAMA,
        "dim": 32,
        "n_layers": 4,
        "head_dim": 8,
        "n_heads": 4,
        "n_kv_heads": 2,
        "biases": ("wq", "wk", "wv"),
        "rope_theta": 100.0,
    }
    turned: Mapping[str, int] = {"wq": 4, "wk": 2}
    sizes = (
        "qwen2.embedding_length",
        "qwen2.block_count",
        "qwen2.feed_forward_length",
        "qwen2.attention.head_count_kv",
    )


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
    suites = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert set(re.findall(r'spec = ARCHITECTURES\["([a-z0-9-]+)"\]', suites)) == set(ARCHITECTURES)


# --- the suite fails what is broken ---------------------------------------------


def careless(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any, cap: float | None
) -> mx.array:
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
    monkeypatch.setattr(ops, "attention", careless)
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

    monkeypatch.setattr(layers, "rms_norm", norm)
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


def test_a_table_that_loses_doubles_or_moves_rows_fails() -> None:
    layout = TestLlama.spec.layouts["hf"]

    def suite(change: Any) -> ArchitectureSuite:
        def table(args: Any) -> list[ForeignTensor]:
            return [changed for entry in layout.table(args) if (changed := change(entry)) is not None]

        return broken(layouts={"hf": replace(layout, table=table)})

    suite(lambda entry: entry).test_a_table_out_and_in_again_is_the_identity()
    name = "layers.1.attention.wk.weight"
    for change, told in (
        (lambda e: None if e.name == name else e, "does not name every parameter once"),
        (lambda e: replace(e, rows=[0] * 12) if e.name == name else e, "are no new order"),
        (lambda e: replace(e, start=3) if e.name == name else e, "leave rows out"),
    ):
        with pytest.raises(AssertionError, match=told):
            suite(change).test_a_table_out_and_in_again_is_the_identity()


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
