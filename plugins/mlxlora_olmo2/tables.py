"""The parameters of a model as Hugging Face, mlx-lm and GGUF name and order them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlxlora_core.api import ForeignTensor, neighbour_rows
from mlxlora_olmo2.config import ModelArgs


@dataclass(frozen=True)
class _Names:
    """What a layout calls the parameters.

    Attributes:
        top: module -> its name there.
        layer: what stands in front of what belongs to a layer, with a place for its number.
        modules: module of a layer -> its name there.
    """

    top: Mapping[str, str]
    layer: str
    modules: Mapping[str, str]


_HF = _Names(
    {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"},
    "model.layers.{}.",
    {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "attention_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "ffn_norm": "post_feedforward_layernorm",
    },
)
_GGUF = _Names(
    {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"},
    "blk.{}.",
    {
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "attention_norm": "post_attention_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
        "ffn_norm": "post_ffw_norm",
    },
)
_BIASED = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")


def hf(args: ModelArgs) -> list[ForeignTensor]:
    """Every parameter of a model as Hugging Face and mlx-lm store it."""
    return list(_table(args, _HF))


def gguf(args: ModelArgs) -> list[ForeignTensor]:
    """Every parameter of a model as GGUF stores it."""
    return list(_table(args, _GGUF))


def _table(args: ModelArgs, names: _Names) -> Iterator[ForeignTensor]:
    """The parameters from the embedding up to the head, which a tied model has none of."""
    queries, keys = (neighbour_rows(heads, args.head_dim) for heads in (args.n_heads, args.n_kv_heads))
    # The norms have a weight for each feature of each head, so that these are ordered like the rows.
    rows = dict.fromkeys(("attention.wq", "attention.q_norm"), queries)
    rows |= dict.fromkeys(("attention.wk", "attention.k_norm"), keys)
    yield ForeignTensor("tok_embeddings.weight", f"{names.top['tok_embeddings']}.weight")
    for layer in range(args.n_layers):
        for module, foreign in names.modules.items():
            for kind in ("weight", "bias") if args.attention_bias and module in _BIASED else ("weight",):
                there = f"{names.layer.format(layer)}{foreign}.{kind}"
                yield ForeignTensor(f"layers.{layer}.{module}.{kind}", there, rows.get(module))
    for module in ("norm", *(() if args.tie_word_embeddings else ("output",))):
        yield ForeignTensor(f"{module}.weight", f"{names.top[module]}.weight")
