"""The metadata of a GGUF file: the arguments out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxlora_core.api import ModelError, UsageError, parse
from mlxlora_core.files import KnownKeys, show_value
from mlxlora_llama.config import LINEARS, ModelArgs
from mlxlora_llama.rope import yarn_attention

Shapes = Mapping[str, tuple[int, ...]]

#: ``general.architecture`` -> ``model_type`` here
_TYPES = {"llama": "llama", "mistral3": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
MODEL_TYPES = tuple(_TYPES)

ARCHITECTURE, DIVISORS = "general.architecture", "rope_freqs.weight"
_HEAD, _EMBEDDING, _FIRST = "output.weight", "token_embd.weight", "blk.0."
#: argument -> its key, after the name of the architecture
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
    "rope_scaling": "rope.scaling.type",
    "rope_factor": "rope.scaling.factor",
    "rope_original_len": "rope.scaling.original_context_length",
    "rope_beta_fast": "rope.scaling.yarn_beta_fast",
    "rope_beta_slow": "rope.scaling.yarn_beta_slow",
    "rope_divisors": DIVISORS,
}
VALUE_WIDTH, ROTATED = "attention.value_length", "rope.dimension_count"
_OLD_FACTOR, SCALED = "rope.scale_linear", "rope.scaling.attn_factor"
_YARN_FACTOR, _YARN_LOG = "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_log_multiplier"
_HONOURED = (*NAMES.values(), VALUE_WIDTH, ROTATED, _OLD_FACTOR, SCALED, _YARN_FACTOR, _YARN_LOG)
#: what a key counts, 0 where there are none
_ABSENT = ("expert_count", "expert_used_count", "nextn_predict_layers", "attention.temperature_scale")
_AS_BUILT = dict.fromkeys(_ABSENT, (0,)) | {"attention.causal": (True,), "hidden_activation": ("silu",)}
# What the file and its making are; what llama.cpp says of how to draw and to split.
_HARMLESS = re.compile(
    r"(general|split|quantize|tokenizer|imatrix|mradermacher|unsloth)\..*|"
    r"[a-z0-9]+\.(rope\.scaling\.finetuned|tensor_data_layout)"
)
EVERY = 4  # the layers of SmolLM3 without positions, which no key states
_THETA = 1e4  # what llama.cpp takes where no base is stated
_LINEAR_NAMES = {
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
}


def read(raw: Mapping[str, Any], shapes: Shapes) -> ModelArgs | None:
    """The arguments out of a file's metadata, or None for a model of another family.

    Args:
        raw: key -> value, the keys of the tokenizer left out, and the values of
            ``rope_freqs.weight`` as a list under this name.
        shapes: of its tensors by name, (rows, columns).

    Raises:
        ModelError: values that are missing or impossible, and keys that may change what the
            model computes and are not built here, or not known; all told at once.
    """
    architecture = raw.get(ARCHITECTURE)
    if not isinstance(architecture, str) or architecture not in _TYPES:
        return None
    prefix = f"{architecture}."
    known = KnownKeys({prefix + key: good for key, good in _AS_BUILT.items()}, _HARMLESS)
    told = known.faults(raw, {_key(prefix, key) for key in _HONOURED})
    stated = {key.removeprefix(prefix): value for key, value in raw.items()}
    values = _values(stated, shapes) | {"model_type": _TYPES[architecture]}
    told += [prefix + fault for fault in _faults(stated, values)]
    try:
        args = parse(
            ModelArgs,
            {name: value for name, value in values.items() if value is not None},
            owner="llama",
            spell=lambda name: _key(prefix, NAMES.get(name, name)),
            strict=True,
        )
    except UsageError as fault:
        told.append(fault.what)
    if told:
        raise ModelError("; ".join(told))
    return args


def _key(prefix: str, key: str) -> str:
    """A key as the file has it; the divisors are a tensor, whose name is the same in every family."""
    return key if key == DIVISORS else prefix + key


def notes(raw: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What was assumed that a file usually states, in words."""
    if f"{raw[ARCHITECTURE]}.rope.freq_base" in raw:
        return []
    return [f"the file states no rope.freq_base: {_THETA} is taken, as llama.cpp has it"]


def _values(stated: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """argument -> value; None is left out."""
    plain = ("dim", "n_layers", "hidden_dim", "norm_eps", "max_seq_len", "n_heads", "n_kv_heads", "head_dim")
    found = {name: stated.get(NAMES[name]) for name in plain}
    heads, dim = _whole(found["n_heads"]), _whole(found["dim"])
    if found["head_dim"] is None and heads and not dim % heads:
        found["head_dim"] = dim // heads or None
    if found["n_kv_heads"] is None:
        found["n_kv_heads"] = heads or None
    rows = (shapes.get(_EMBEDDING) or (0,))[0]
    biases = tuple(name for name in LINEARS if f"{_FIRST}{_LINEAR_NAMES[name]}.bias" in shapes)
    smollm3 = stated.get(ARCHITECTURE) == "smollm3"
    layers = min(_whole(found["n_layers"]), 1024)
    return {
        **found,
        # The key is of the tokenizer's tokens in some files: the rows are what the model has.
        "vocab_size": rows or stated.get(NAMES["vocab_size"]),
        "rope_theta": stated.get(NAMES["rope_theta"], _THETA),
        "tie_word_embeddings": _HEAD not in shapes,
        "biases": biases or None,
        "head_norms": True if stated.get(ARCHITECTURE) == "qwen3" else None,
        "unrotated_layers": tuple(range(EVERY - 1, layers, EVERY)) or None if smollm3 else None,
        **_scaling(stated),
    }


def _scaling(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of rotary positions, with what llama.cpp takes where it is not stated."""
    divisors = stated.get(DIVISORS)
    factor = stated.get(NAMES["rope_factor"], stated.get(_OLD_FACTOR))
    kind = stated.get(NAMES["rope_scaling"], "linear")
    if kind == "none" or factor in (None, 0, 1) or isinstance(factor, bool):
        return {} if divisors is None else {"rope_scaling": "divisors", "rope_divisors": divisors}
    found = {"rope_scaling": kind, "rope_factor": factor}
    if kind == "yarn":
        found["rope_original_len"] = stated.get(NAMES["rope_original_len"], stated.get("context_length"))
        found["rope_beta_fast"] = stated.get(NAMES["rope_beta_fast"], 32.0)
        found["rope_beta_slow"] = stated.get(NAMES["rope_beta_slow"], 1.0)
        found["rope_attention_factor"] = _attention(stated, factor)
    return found


def _attention(stated: Mapping[str, Any], factor: Any) -> Any:
    """What YaRN multiplies queries and keys by."""
    told, by, times = (stated.get(key) for key in (_YARN_FACTOR, _YARN_LOG, SCALED))
    if not all(isinstance(value, (int, float)) for value in (factor, by or 0, times or 0)) or factor <= 0:
        return None
    if told is None:
        told = yarn_attention(factor)
        if by:
            told /= 1 + by * (told - 1)
    return told * times if times and isinstance(told, (int, float)) else told


def _faults(stated: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """What is stated and not built here."""
    told = []
    for key in (VALUE_WIDTH, ROTATED):
        if stated.get(key) not in (None, values["head_dim"]):
            told.append(
                f"{key}: got {show_value(stated[key])}, wanted the width of a head, {values['head_dim']}"
            )
    if stated.get(DIVISORS) is not None and values.get("rope_scaling") not in (None, "divisors"):
        kind = show_value(values["rope_scaling"])
        told.append(f"{NAMES['rope_scaling']}: got {kind}, but there is a {DIVISORS} too")
    if stated.get(SCALED) not in (None, 1) and values.get("rope_scaling") != "yarn":
        told.append(f"{SCALED}: got {show_value(stated[SCALED])}, which only a yarn has here")
    return told


def _whole(value: Any) -> int:
    """A whole number above 0, or 0 for anything else."""
    return value if type(value) is int and value > 0 else 0
