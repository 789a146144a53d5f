"""The parameters as Hugging Face, mlx-lm and GGUF name, order and shift them: one table a layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlxlora_core.api import ForeignTensor, neighbour_rows
from mlxlora_gemma.config import ModelArgs


@dataclass(frozen=True)
class _Names:
    """What a layout calls the parameters.

    Attributes:
        top: module -> its name there.
        layer: what stands in front of what belongs to a layer, with a place for its number.
        modules: module of a layer -> its name there.
        norm_shift: what is added to the weight of a norm there to have it here.
    """

    top: Mapping[str, str]
    layer: str
    modules: Mapping[str, str]
    norm_shift: float = 0.0


_HF = _Names(
    {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"},
    "model.layers.{}.",
    {
        "attention_norm": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "post_ffn_norm": "post_feedforward_layernorm",
    },
)
_GGUF = _Names(
    {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"},
    "blk.{}.",
    {
        "attention_norm": "attn_norm",
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "post_attention_norm": "post_attention_norm",
        "ffn_norm": "ffn_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
        "post_ffn_norm": "post_ffw_norm",
    },
    norm_shift=-1.0,  # there norms hold what is multiplied by, here and in Hugging Face one less
)
_HEAD_NORMS = ("attention.q_norm", "attention.k_norm")


def hf(args: ModelArgs) -> list[ForeignTensor]:
    """Every parameter of a model as Hugging Face and mlx-lm store it."""
    return list(_table(args, _HF))


def gguf(args: ModelArgs) -> list[ForeignTensor]:
    """Every parameter of a model as GGUF stores it."""
    return list(_table(args, _GGUF))


def _table(args: ModelArgs, names: _Names) -> Iterator[ForeignTensor]:
    """The parameters from the embedding up to the head, which a tied model has none of."""
    yield _entry("tok_embeddings", names.top["tok_embeddings"], names)
    one = neighbour_rows(1, args.head_dim)
    rows = {
        "attention.wq": neighbour_rows(args.n_heads, args.head_dim),
        "attention.wk": neighbour_rows(args.n_kv_heads, args.head_dim),
        **dict.fromkeys(_HEAD_NORMS, one),
    }
    modules = {m: there for m, there in names.modules.items() if args.head_norms or m not in _HEAD_NORMS}
    for layer in range(args.n_layers):
        for module, there in modules.items():
            path = f"{names.layer.format(layer)}{there}"
            yield _entry(f"layers.{layer}.{module}", path, names, rows.get(module))
    for module in ("norm", *(() if args.tie_word_embeddings else ("output",))):
        yield _entry(module, names.top[module], names)


def _entry(module: str, foreign: str, names: _Names, rows: list[int] | None = None) -> ForeignTensor:
    """The weight of a module."""
    shift = names.norm_shift if module.endswith("norm") else 0.0
    return ForeignTensor(f"{module}.weight", f"{foreign}.weight", rows, shift=shift)
