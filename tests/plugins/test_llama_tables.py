"""The parameters of a model under the names, and in the order, of Hugging Face's libraries and of GGUF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llama_torch
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlxlora_llama import build, tables
from mlxlora_llama.config import ModelArgs

from mlxlora_core.api import ForeignTensor

ARGS = ModelArgs("llama", 32, 2, 8, 64, 4, 2, 1e-5, 320)
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "biases": ("wq", "wk", "wv")},
    "qwen3": {"model_type": "qwen3", "head_norms": True, "tie_word_embeddings": True},
    "biases": {"biases": ("wq", "wk", "wv", "wo", "w1", "w2", "w3")},
}
HF = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.1.attention_norm.weight": "model.layers.1.input_layernorm.weight",
    "layers.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    "layers.1.attention.wq.bias": "model.layers.1.self_attn.q_proj.bias",
    "layers.1.attention.wk.weight": "model.layers.1.self_attn.k_proj.weight",
    "layers.1.attention.wv.weight": "model.layers.1.self_attn.v_proj.weight",
    "layers.1.attention.wo.bias": "model.layers.1.self_attn.o_proj.bias",
    "layers.1.feed_forward.w1.weight": "model.layers.1.mlp.gate_proj.weight",
    "layers.1.feed_forward.w2.weight": "model.layers.1.mlp.down_proj.weight",
    "layers.1.feed_forward.w3.bias": "model.layers.1.mlp.up_proj.bias",
    "layers.1.attention.q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
    "layers.1.attention.k_norm.weight": "model.layers.1.self_attn.k_norm.weight",
}
GGUF = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
    "layers.1.attention_norm.weight": "blk.1.attn_norm.weight",
    "layers.1.ffn_norm.weight": "blk.1.ffn_norm.weight",
    "layers.1.attention.wq.bias": "blk.1.attn_q.bias",
    "layers.1.attention.wk.weight": "blk.1.attn_k.weight",
    "layers.1.attention.wv.weight": "blk.1.attn_v.weight",
    "layers.1.attention.wo.bias": "blk.1.attn_output.bias",
    "layers.1.feed_forward.w1.weight": "blk.1.ffn_gate.weight",
    "layers.1.feed_forward.w2.weight": "blk.1.ffn_down.weight",
    "layers.1.feed_forward.w3.bias": "blk.1.ffn_up.bias",
    "layers.1.attention.q_norm.weight": "blk.1.attn_q_norm.weight",
    "layers.1.attention.k_norm.weight": "blk.1.attn_k_norm.weight",
}
Table = Callable[[ModelArgs], Sequence[ForeignTensor]]


def args_of(**flags: Any) -> ModelArgs:
    return ModelArgs(**{**{name: getattr(ARGS, name) for name in ARGS.__dataclass_fields__}, **flags})


@pytest.mark.parametrize(("table", "names"), [(tables.hf, HF), (tables.gguf, GGUF)], ids=["hf", "gguf"])
def test_each_parameter_has_its_name(table: Table, names: dict[str, str]) -> None:
    args = args_of(biases=("wq", "wo", "w3"), head_norms=True)
    found = {entry.name: entry.foreign for entry in table(args)}
    assert {name: found[name] for name in names} == names
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("table", [tables.hf, tables.gguf])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_table_names_every_parameter_once(table: Table, flags: dict[str, Any]) -> None:
    args = args_of(**flags)
    names = [entry.name for entry in table(args)]
    built: Any = build(args)
    assert sorted(names) == sorted(name for name, _ in tree_flatten(built.parameters()))


@pytest.mark.parametrize("table", [tables.hf, tables.gguf])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_out_and_in_again_is_the_identity(table: Table, flags: dict[str, Any]) -> None:
    """Every tensor there is each row here once, so that nothing is lost either way."""
    args = args_of(**flags)
    built: Any = build(args)
    shapes = {name: value.shape for name, value in tree_flatten(built.parameters())}
    draw = np.random.default_rng(0)
    for entry in table(args):
        ours = draw.standard_normal(shapes[entry.name])
        theirs = np.full_like(ours, np.nan)
        rows = list(range(len(ours))) if entry.rows is None else list(entry.rows)
        theirs[rows] = ours
        np.testing.assert_array_equal(theirs[rows], ours)
        assert sorted(rows) == list(range(len(ours))) and (entry.start, entry.shift) == (None, 0.0)


@pytest.mark.parametrize(
    ("table", "model_type", "turned"),
    [
        (tables.hf, "llama", True),
        (tables.hf, "qwen3", True),
        (tables.hf, "smollm3", True),
        (tables.gguf, "llama", False),
        (tables.gguf, "mistral", False),
        (tables.gguf, "smollm3", False),
        (tables.gguf, "qwen2", True),
        (tables.gguf, "qwen3", True),
    ],
)
def test_queries_and_keys_alone_are_in_another_order(table: Table, model_type: str, turned: bool) -> None:
    args = args_of(model_type=model_type, head_norms=True, biases=tuple(tables.LINEARS))
    ordered = {entry.name for entry in table(args) if entry.rows is not None}
    parts = ("wq.weight", "wq.bias", "wk.weight", "wk.bias", "q_norm.weight", "k_norm.weight")
    assert ordered == (
        {f"layers.{n}.attention.{part}" for n in (0, 1) for part in parts} if turned else set()
    )


def in_halves(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of (B, T, H, E) as there: features i and i + E / 2 are a pair."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    sin, cos = (f(angle)[:, None, :] for f in (torch.sin, torch.cos))
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, low * sin + high * cos], -1)


@pytest.mark.parametrize(("name", "heads"), [("q", 4), ("k", 2)])
def test_rows_in_our_order_turn_as_theirs_do(name: str, heads: int) -> None:
    theirs = torch.randn(1, 5, heads, 8, generator=torch.Generator().manual_seed(0))
    found = {entry.name: entry.rows for entry in tables.hf(ARGS)}[f"layers.0.attention.w{name}.weight"]
    assert found is not None
    rows = torch.tensor(found)
    ours = theirs.flatten(2)[..., rows].unflatten(2, (heads, 8))
    turned = in_halves(theirs).flatten(2)[..., rows].unflatten(2, (heads, 8))
    frequency, _ = llama_torch.frequencies({"head_dim": 8})
    torch.testing.assert_close(llama_torch.rotate(ours, frequency), turned, atol=1e-5, rtol=1e-5)


def test_a_large_model_is_one_list_of_rows_for_all_its_layers() -> None:
    args = args_of(n_layers=1024)
    queries = [entry.rows for entry in tables.hf(args) if entry.name.endswith("wq.weight")]
    assert len(queries) == 1024 and len({id(rows) for rows in queries}) == 1
