"""The metadata of a GGUF file: the arguments out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxlora_core.api import ModelError, UsageError, parse
from mlxlora_core.files import KnownKeys, show_value
from mlxlora_gemma.config import GEMMA2, GEMMA3, MOST_LAYERS, ModelArgs

Shapes = Mapping[str, tuple[int, ...]]

#: ``general.architecture`` -> ``model_type`` here
TYPES = {"gemma2": GEMMA2, "gemma3": GEMMA3}
MODEL_TYPES = tuple(TYPES)

ARCHITECTURE = "general.architecture"
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
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
    "rope_factor": "rope.scaling.factor",
    "sliding_rope_theta": "rope.freq_base_swa",
    "sliding_window": "attention.sliding_window",
    "window_layers": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
PLAIN = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "max_seq_len")
SCALING, _OLD_FACTOR = "rope.scaling.type", "rope.scale_linear"
WIDTHS = ("attention.value_length", "rope.dimension_count")
_HONOURED = (*NAMES.values(), SCALING, _OLD_FACTOR, *WIDTHS)
_AS_BUILT: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "rope.scaling.attn_factor": (1,),
    "hidden_activation": ("gelu_pytorch_tanh",),
}
# What the file and its making are, and what stands beside a text model.
_HARMLESS = re.compile(
    r"(general|split|quantize|tokenizer|imatrix|mradermacher|unsloth)\..*|"
    r"[a-z0-9]+\.(rope\.scaling\.(finetuned|original_context_length)|tensor_data_layout|"
    r"mm\.tokens_per_image|vision\..*)"
)
# What llama.cpp takes where a file does not say.
_THETA, _WINDOW_OF_GEMMA2, _ATTENTION_CAP, _FINAL_CAP = 1e4, 4096, 50.0, 30.0
EVERY = {GEMMA2: 2, GEMMA3: 6}
#: the layers of the models whose queries are scaled by D / H and not by E, which no key states
SCALED_BY_WIDTH = {GEMMA2: 46, GEMMA3: 62}


def read(raw: Mapping[str, Any], shapes: Shapes) -> ModelArgs | None:
    """The arguments out of a file's metadata, or None for a model of another family.

    Args:
        raw: key -> value, the keys of the tokenizer left out.
        shapes: of its tensors by name, (rows, columns).

    Raises:
        ModelError: values that are missing or impossible, and keys that may change what the
            model computes and are not built here, or not known; all told at once.
    """
    architecture = raw.get(ARCHITECTURE)
    if not isinstance(architecture, str) or architecture not in TYPES:
        return None
    prefix, kind = f"{architecture}.", TYPES[architecture]
    known = KnownKeys({prefix + key: good for key, good in _AS_BUILT.items()}, _HARMLESS)
    told = known.faults(raw, {prefix + key for key in _HONOURED})
    stated = {key.removeprefix(prefix): value for key, value in raw.items()}
    values, wrong = _values(stated, kind, shapes)
    told += [prefix + fault for fault in wrong]
    try:
        args = parse(
            ModelArgs,
            {name: value for name, value in values.items() if value is not None},
            owner="gemma",
            spell=lambda name: prefix + NAMES.get(name, name),
            strict=True,
        )
    except UsageError as fault:
        told.append(fault.what)
    if told:
        raise ModelError("; ".join(told))
    return args


def notes(raw: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What was assumed that a file usually states, in words."""
    architecture = raw[ARCHITECTURE]
    if TYPES[architecture] == GEMMA2 or f"{architecture}.rope.freq_base" in raw:
        return []  # those of Gemma 2 never state it
    return [f"the file states no rope.freq_base: {_THETA} is taken, as llama.cpp has it"]


def _values(stated: Mapping[str, Any], kind: str, shapes: Shapes) -> tuple[dict[str, Any], list[str]]:
    """argument -> value, None where a model does without, and what is wrong with what they are made of."""
    found = {name: stated.get(NAMES[name]) for name in PLAIN}
    heads, dim = _whole(found["n_heads"]), _whole(found["dim"])
    layers = min(_whole(found["n_layers"]), MOST_LAYERS)
    share = dim // heads if heads else 0
    if found["head_dim"] is None:
        found["head_dim"] = share if heads and not dim % heads else None
    if found["n_kv_heads"] is None:
        found["n_kv_heads"] = heads or None
    window = stated.get(NAMES["sliding_window"], _WINDOW_OF_GEMMA2 if kind == GEMMA2 else None)
    factor, told = _factor(stated)
    bounded, wrong = _bounded(stated, kind, layers)
    told += wrong + _width_faults(stated, found["head_dim"])
    if window == 0 or (layers and not bounded):  # a window is checked whatever the layers are
        window = None
    local = stated.get(NAMES["sliding_rope_theta"], _THETA if kind == GEMMA3 else None)
    rows = (shapes.get(_EMBEDDING) or (0,))[0]
    found |= {
        "model_type": kind,
        # The key is of the tokenizer's tokens in some files: the rows are what the model has.
        "vocab_size": rows or stated.get(NAMES["vocab_size"]),
        "query_pre_attn_scalar": share if layers == SCALED_BY_WIDTH[kind] else found["head_dim"],
        "rope_theta": stated.get(NAMES["rope_theta"], _THETA),
        "rope_factor": factor,
        "sliding_rope_theta": None if window is None else local,
        "sliding_window": window,
        "window_layers": None if window is None or len(bounded) == layers else bounded,
        "head_norms": True if kind == GEMMA3 else None,
        "tie_word_embeddings": _HEAD not in shapes,
    }
    caps, faults = _caps(stated, kind)
    return found | caps, told + faults


def _caps(stated: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
    """What scores and logits stay below: of Gemma 3 the scores are not capped."""
    attention, final = (stated.get(NAMES[f"{name}_logit_softcapping"]) for name in ("attn", "final"))
    if kind == GEMMA3:
        told = [] if attention in (None, 0) else [f"attn_logit_softcapping: got {show_value(attention)}"]
        return {"final_logit_softcapping": None if final == 0 else final}, [
            f"{fault}, which llama.cpp leaves out of a gemma3" for fault in told
        ]
    return {
        "attn_logit_softcapping": _ATTENTION_CAP if attention is None else attention,
        "final_logit_softcapping": _FINAL_CAP if final is None else final,
    }, []


def _factor(stated: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """What frequencies are divided by, or None, and what is wrong with how it is stated."""
    factor = stated.get(NAMES["rope_factor"], stated.get(_OLD_FACTOR))
    scaling = stated.get(SCALING, "linear")
    if scaling == "none" or factor is None or (factor in (0, 1) and not isinstance(factor, bool)):
        return None, []
    if scaling != "linear":
        return None, [f"{SCALING}: got {show_value(scaling)}, but only none and linear are built here"]
    return factor, []


def _bounded(stated: Mapping[str, Any], kind: str, layers: int) -> tuple[tuple[int, ...], list[str]]:
    """The layers that the window bounds: all but every so-manieth, or those that are marked."""
    key = NAMES["window_layers"]
    pattern = stated.get(key, EVERY[kind])
    if isinstance(pattern, list) and all(type(mark) in (bool, int) and mark in (0, 1) for mark in pattern):
        if len(pattern) >= layers:
            return tuple(layer for layer in range(layers) if pattern[layer]), []
    elif type(pattern) is int and pattern >= 1:
        return tuple(layer for layer in range(layers) if (layer + 1) % pattern), []
    return (), [
        f"{key}: got {show_value(pattern)}, wanted a whole number or a mark for each of {layers} layers"
    ]


def _width_faults(stated: Mapping[str, Any], width: Any) -> list[str]:
    """Widths that are stated and are not that of a head."""
    return [
        f"{key}: got {show_value(stated[key])}, wanted the width of a head, {show_value(width)}"
        for key in WIDTHS
        if stated.get(key) not in (None, width)
    ]


def _whole(value: Any) -> int:
    """A whole number above 0, or 0 for anything else."""
    return value if type(value) is int and value > 0 else 0
