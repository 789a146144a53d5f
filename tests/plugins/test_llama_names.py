"""The linears of a Llama under the names, and in the order, of Hugging Face's libraries."""

from __future__ import annotations

import llama_torch
import pytest
import torch
from mlxlora_llama.config import ModelArgs
from mlxlora_llama.names import foreign_linear

ARGS = ModelArgs("llama", 32, 2, 8, 64, 4, 2, 1e-5, 320)
NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


@pytest.mark.parametrize(("theirs", "ours"), NAMES.items())
@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
def test_each_linear_has_its_name(prefix: str, theirs: str, ours: str) -> None:
    found = foreign_linear(f"{prefix}layers.1.{theirs}", ARGS)
    assert found is not None and found.path == f"layers.1.{ours}"
    turned = {"attention.wq": 32, "attention.wk": 16}
    assert sorted(found.rows or ()) == list(range(turned.get(ours, 0)))


@pytest.mark.parametrize(
    "path",
    [
        "layers.0.attention.wq",
        "model.layers.2.self_attn.q_proj",
        "model.layers.0.self_attn.gate_proj",
        "lm_head",
        "layers.0.self_attn.q_proj.linear",
        "model.layers.x.mlp.up_proj",
        "layers.0.mlp.q_proj",
        "",
    ],
)
def test_what_is_no_linear_of_theirs_is_none(path: str) -> None:
    assert foreign_linear(path, ARGS) is None


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
    found = foreign_linear(f"layers.0.self_attn.{name}_proj", ARGS)
    assert found is not None and found.rows is not None
    rows = torch.tensor(found.rows)
    ours = theirs.flatten(2)[..., rows].unflatten(2, (heads, 8))
    turned = in_halves(theirs).flatten(2)[..., rows].unflatten(2, (heads, 8))
    torch.testing.assert_close(llama_torch.rotate(ours, 10000.0), turned, atol=1e-5, rtol=1e-5)
