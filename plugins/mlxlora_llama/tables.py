"""The parameters of a model as Hugging Face, mlx-lm and GGUF name and order them: one table a layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlxlora_core.api import ForeignTensor, neighbour_rows
from mlxlora_llama.config import LINEARS, ModelArgs


@dataclass(frozen=True)
class _Names:
    """What a layout calls the parameters.

    Attributes:
        top: parameter -> name of its tensor.
        layer: what stands in front of what belongs to a layer, with a place for its number.
        modules: module of a layer -> its name there.
    """

    top: Mapping[str, str]
    layer: str
    modules: Mapping[str, str]


_HF = _Names(
    {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
    "model.layers.{}.",
    {
        "attention_norm": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    },
)
_GGUF = _Names(
    {
        "tok_embeddings.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "output.weight": "output.weight",
    },
    "blk.{}.",
    {
        "attention_norm": "attn_norm",
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "ffn_norm": "ffn_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
    },
)
#: families whose queries and keys GGUF leaves in the order of Hugging Face
_GGUF_IN_HALVES = ("qwen2", "qwen3")


def hf(args: ModelArgs) -> list[ForeignTensor]:
    """Every parameter of a model as Hugging Face and mlx-lm store it."""
    return list(_table(args, _HF, in_halves=True))


def gguf(args: ModelArgs) -> list[ForeignTensor]:
    """Every parameter of a model as GGUF stores it."""
    return list(_table(args, _GGUF, in_halves=args.model_type in _GGUF_IN_HALVES))


def _table(args: ModelArgs, names: _Names, *, in_halves: bool) -> Iterator[ForeignTensor]:
    """The parameters from the embedding up to the head, which a tied model has none of."""
    rows = _turned(args) if in_halves else {}
    yield ForeignTensor("tok_embeddings.weight", names.top["tok_embeddings.weight"])
    for layer in range(args.n_layers):
        for module, kinds in _modules(args).items():
            for kind in kinds:
                foreign = f"{names.layer.format(layer)}{names.modules[module]}.{kind}"
                yield ForeignTensor(f"layers.{layer}.{module}.{kind}", foreign, rows.get(module))
    for name in ("norm.weight", *(() if args.tie_word_embeddings else ("output.weight",))):
        yield ForeignTensor(name, names.top[name])


def _modules(args: ModelArgs) -> dict[str, tuple[str, ...]]:
    """module of a layer -> its parameters."""
    norms = ["attention_norm", "ffn_norm"]
    norms += ["attention.q_norm", "attention.k_norm"] if args.head_norms else []
    found: dict[str, tuple[str, ...]] = dict.fromkeys(norms, ("weight",))
    for name, place in LINEARS.items():
        found[f"{place}.{name}"] = ("weight", "bias") if name in (args.biases or ()) else ("weight",)
    return found


def _turned(args: ModelArgs) -> dict[str, Sequence[int]]:
    """module -> which row there each row here is, of those that rotary positions turn."""
    one = neighbour_rows(1, args.head_dim)
    return {
        "attention.wq": neighbour_rows(args.n_heads, args.head_dim),
        "attention.wk": neighbour_rows(args.n_kv_heads, args.head_dim),
        "attention.q_norm": one,
        "attention.k_norm": one,
    }
