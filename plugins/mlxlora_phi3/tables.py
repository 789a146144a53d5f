"""The parameters of a model as Hugging Face, mlx-lm and GGUF name, fuse and order them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlxlora_core.api import ForeignTensor, neighbour_rows
from mlxlora_phi3.config import ModelArgs


@dataclass(frozen=True)
class _Names:
    """What a layout calls the parameters.

    Attributes:
        top: module -> its name there.
        layer: what stands in front of what belongs to a layer, with a place for its number.
        modules: module of a layer, or several that are one there -> its name there.
    """

    top: Mapping[str, str]
    layer: str
    modules: Mapping[str, str]


_HF = _Names(
    {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"},
    "model.layers.{}.",
    {
        "attention_norm": "input_layernorm",
        "qkv": "self_attn.qkv_proj",
        "attention.wo": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "gate_up": "mlp.gate_up_proj",
        "feed_forward.w2": "mlp.down_proj",
    },
)
_GGUF = _Names(
    {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"},
    "blk.{}.",
    {
        "attention_norm": "attn_norm",
        "qkv": "attn_qkv",
        "attention.wo": "attn_output",
        "ffn_norm": "ffn_norm",
        "gate_up": "ffn_up",
        "feed_forward.w2": "ffn_down",
    },
)


def hf(args: ModelArgs) -> list[ForeignTensor]:
    """Every parameter of a model as Hugging Face and mlx-lm store it."""
    return list(_table(args, _HF))


def gguf(args: ModelArgs) -> list[ForeignTensor]:
    """Every parameter of a model as GGUF stores it."""
    return list(_table(args, _GGUF))


def _table(args: ModelArgs, names: _Names) -> Iterator[ForeignTensor]:
    """The parameters from the embedding up to the head, which a tied model has none of."""
    rows = {
        "attention.wq": neighbour_rows(args.n_heads, args.head_dim, args.turned),
        "attention.wk": neighbour_rows(args.n_kv_heads, args.head_dim, args.turned),
    }
    yield ForeignTensor("tok_embeddings.weight", f"{names.top['tok_embeddings']}.weight")
    for layer in range(args.n_layers):
        for module, (foreign, start) in _modules(args).items():
            there = f"{names.layer.format(layer)}{names.modules[foreign]}.weight"
            yield ForeignTensor(f"layers.{layer}.{module}.weight", there, rows.get(module), start)
    for module in ("norm", *(() if args.tie_word_embeddings else ("output",))):
        yield ForeignTensor(f"{module}.weight", f"{names.top[module]}.weight")


def _modules(args: ModelArgs) -> dict[str, tuple[str, int | None]]:
    """module of a layer -> which one it is in there, and its first row in one that is fused."""
    queries, keys = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    whole = ("attention_norm", "attention.wo", "ffn_norm", "feed_forward.w2")
    return {
        **{module: (module, None) for module in whole},
        "attention.wq": ("qkv", 0),
        "attention.wk": ("qkv", queries),
        "attention.wv": ("qkv", queries + keys),
        "feed_forward.w1": ("gate_up", 0),
        "feed_forward.w3": ("gate_up", args.hidden_dim),
    }
