"""The metadata of a GGUF file: the arguments out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxlora_core.api import ModelError, UsageError, parse
from mlxlora_core.files import KnownKeys, show_value
from mlxlora_olmo2.config import ModelArgs

Shapes = Mapping[str, tuple[int, ...]]

MODEL_TYPES = ("olmo2",)

ARCHITECTURE, PREFIX = "general.architecture", "olmo2."
_HEAD, _EMBEDDING, _BIAS = "output.weight", "token_embd.weight", "blk.0.attn_q.bias"
#: argument -> its key, without the prefix
NAMES = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_dim": "feed_forward_length",
    "vocab_size": "vocab_size",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "max_seq_len": "context_length",
    "rope_theta": "rope.freq_base",
}
WIDTHS = ("attention.value_length", "rope.dimension_count")
_AS_BUILT = {
    **dict.fromkeys(("expert_count", "expert_used_count", "attention.sliding_window"), (0,)),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "attention.causal": (True,),
}
# What the file and its making are, and how text is drawn and split.
_KEYS = KnownKeys(
    {PREFIX + key: good for key, good in _AS_BUILT.items()},
    re.compile(
        r"(general|split|quantize|tokenizer|imatrix|mradermacher|unsloth)\..*|"
        r"[a-z0-9]+\.(rope\.scaling\.finetuned|tensor_data_layout)"
    ),
)
_THETA = 1e4  # what llama.cpp takes where no base is stated


def read(raw: Mapping[str, Any], shapes: Shapes) -> ModelArgs | None:
    """The arguments out of a file's metadata, or None for a model of another family.

    OLMo 3 has the same name there, and windows and scaled positions, which are refused.

    Args:
        raw: key -> value, the keys of the tokenizer left out.
        shapes: of its tensors by name, (rows, columns).

    Raises:
        ModelError: values that are missing or impossible, and keys that may change what the
            model computes and are not built here, or not known; all told at once.
    """
    if raw.get(ARCHITECTURE) not in MODEL_TYPES:
        return None
    told = _KEYS.faults(raw, {PREFIX + key for key in (*NAMES.values(), *WIDTHS)})
    stated = {key.removeprefix(PREFIX): value for key, value in raw.items()}
    values = _values(stated, shapes)
    for key in WIDTHS:
        if stated.get(key) not in (None, values["head_dim"]):
            wanted = f"wanted the width of a head, {values['head_dim']}"
            told.append(f"{PREFIX}{key}: got {show_value(stated[key])}, {wanted}")
    try:
        args = parse(
            ModelArgs,
            {name: value for name, value in values.items() if value is not None},
            owner="olmo2",
            spell=lambda name: PREFIX + NAMES[name] if name in NAMES else name,
            strict=True,
        )
    except UsageError as fault:
        told.append(fault.what)
    if told:
        raise ModelError("; ".join(told))
    return args


def notes(raw: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What was assumed that a file usually states, in words."""
    if PREFIX + NAMES["rope_theta"] in raw:
        return []
    return [f"the file states no {NAMES['rope_theta']}: {_THETA} is taken, as llama.cpp has it"]


def _values(stated: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """argument -> value; None is left out."""
    found = {name: stated.get(key) for name, key in NAMES.items()}
    heads, dim = _whole(found["n_heads"]), _whole(found["dim"])
    if found["head_dim"] is None and heads and not dim % heads:
        found["head_dim"] = dim // heads or None
    if found["n_kv_heads"] is None:
        found["n_kv_heads"] = found["n_heads"]
    if found["rope_theta"] is None:
        found["rope_theta"] = _THETA
    rows = (shapes.get(_EMBEDDING) or (0,))[0]
    # The key is of the tokenizer's tokens in some files: the rows are what the model has.
    found["vocab_size"] = rows or found["vocab_size"]
    return {
        **found,
        "model_type": "olmo2",
        "tie_word_embeddings": _HEAD not in shapes,
        "attention_bias": True if _BIAS in shapes else None,
    }


def _whole(value: Any) -> int:
    """A whole number above 0 that a model may have, or 0 for anything else."""
    return value if type(value) is int and 0 < value < 1 << 31 else 0
