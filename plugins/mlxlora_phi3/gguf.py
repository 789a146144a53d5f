"""The metadata of a GGUF file: the arguments out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxlora_core.api import ModelError, UsageError, parse
from mlxlora_core.files import KnownKeys, show_value
from mlxlora_phi3.config import ModelArgs

Shapes = Mapping[str, tuple[int, ...]]

MODEL_TYPES = ("phi3",)

ARCHITECTURE, PREFIX = "general.architecture", "phi3."
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
#: argument -> its key, without the prefix; the divisors are tensors
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
    "sliding_window": "attention.sliding_window",
    "rotary_dim": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
    "rope_original_len": "rope.scaling.original_context_length",
    "rope_attention_factor": "rope.scaling.attn_factor",
}
_SPELT = {name: PREFIX + key for name, key in NAMES.items()} | {
    "rope_short_divisors": SHORT,
    "rope_long_divisors": LONG,
}
VALUE_WIDTH = "attention.value_length"
_AS_BUILT = {
    **dict.fromkeys(("expert_count", "expert_used_count"), (0,)),
    "rope.scaling.type": ("none", "longrope"),  # what the tensors of divisors say too
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

    Args:
        raw: key -> value, the keys of the tokenizer left out, and the values of
            ``rope_factors_short.weight`` and ``rope_factors_long.weight`` as lists under these names.
        shapes: of its tensors by name, (rows, columns).

    Raises:
        ModelError: values that are missing or impossible, and keys that may change what the
            model computes and are not built here, or not known; all told at once.
    """
    if raw.get(ARCHITECTURE) not in MODEL_TYPES:
        return None
    told = _KEYS.faults(raw, {*_SPELT.values(), PREFIX + VALUE_WIDTH})
    stated = {key.removeprefix(PREFIX): value for key, value in raw.items()}
    values = _values(stated, shapes)
    if stated.get(VALUE_WIDTH) not in (None, values["head_dim"]):
        told.append(
            f"{PREFIX}{VALUE_WIDTH}: got {show_value(stated[VALUE_WIDTH])}, wanted the width of a head, "
            f"{values['head_dim']}"
        )
    try:
        args = parse(
            ModelArgs,
            {name: value for name, value in values.items() if value is not None},
            owner="phi3",
            spell=lambda name: _SPELT.get(name, name),
            strict=True,
        )
    except UsageError as fault:
        told.append(fault.what)
    if told:
        raise ModelError("; ".join(told))
    return args


def notes(raw: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What was assumed that a file usually states, and what its owner may not expect, in words."""
    told = []
    if _SPELT["rope_theta"] not in raw:
        told.append(f"the file states no {NAMES['rope_theta']}: {_THETA} is taken, as llama.cpp has it")
    if raw.get(SHORT) is not None:
        original = raw[_SPELT["rope_original_len"]]
        told.append(
            f"positions turn in one way in texts of up to {original} tokens and in another in longer ones; "
            "llama.cpp takes the one of its whole context for all"
        )
    window = raw.get(_SPELT["sliding_window"]) or 0
    if 0 < window < (raw.get(_SPELT["max_seq_len"]) or window + 1):
        told.append(f"a token sees {window} tokens, as transformers has it; llama.cpp lets it see all")
    return told


def _values(stated: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """argument -> value; None is left out."""
    found = {name: stated.get(key) for name, key in NAMES.items()}
    heads, dim = _whole(found["n_heads"]), _whole(found["dim"])
    if found["head_dim"] is None and heads and not dim % heads:
        found["head_dim"] = dim // heads or None
    if found["n_kv_heads"] is None:
        found["n_kv_heads"] = found["n_heads"]
    if found["rotary_dim"] == found["head_dim"]:
        found["rotary_dim"] = None
    if found["sliding_window"] == 0 and found["sliding_window"] is not False:
        found["sliding_window"] = None
    if found["rope_theta"] is None:
        found["rope_theta"] = _THETA
    found |= {"rope_short_divisors": stated.get(SHORT), "rope_long_divisors": stated.get(LONG)}
    if found["rope_short_divisors"] is None and found["rope_long_divisors"] is None:
        # Every file states the original length; without divisors it changes nothing.
        found["rope_original_len"] = None
        if found["rope_attention_factor"] == 1:
            found["rope_attention_factor"] = None
    elif found["rope_attention_factor"] is None:
        found["rope_attention_factor"] = 1.0
    rows = (shapes.get(_EMBEDDING) or (0,))[0]
    # The key is of the tokenizer's tokens in some files: the rows are what the model has.
    found["vocab_size"] = rows or found["vocab_size"]
    return {**found, "model_type": "phi3", "tie_word_embeddings": _HEAD not in shapes}


def _whole(value: Any) -> int:
    """A whole number above 0 that a model may have, or 0 for anything else."""
    return value if type(value) is int and 0 < value < 1 << 31 else 0
