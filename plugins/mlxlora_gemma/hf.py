"""The config.json of Hugging Face and mlx-lm: the arguments out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxlora_core.api import ModelError, UsageError, listing, parse
from mlxlora_core.files import KnownKeys, show_key, show_value
from mlxlora_gemma import hf_rope
from mlxlora_gemma.config import GEMMA2, GEMMA3, MODEL_TYPES, MOST_LAYERS, ModelArgs

__all__ = ["MODEL_TYPES", "notes", "read"]

Shapes = Mapping[str, tuple[int, ...]]

_HEAD, _TIED, _EMBEDDING = "lm_head.weight", "tie_word_embeddings", "model.embed_tokens.weight"
_FIRST = "model.layers.0.self_attn."
_KINDS, _WINDOW, _FULL, _SLIDING = "layer_types", "sliding_window", "full_attention", "sliding_attention"
_PATTERN, _OWN_PATTERN = "sliding_window_pattern", "_sliding_window_pattern"
_ATTENTION_CAP, _FINAL_CAP = "attn_logit_softcapping", "final_logit_softcapping"
#: argument -> what it is called there
_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "max_seq_len": "max_position_embeddings",
    _WINDOW: _WINDOW,
    "window_layers": _KINDS,
    _ATTENTION_CAP: _ATTENTION_CAP,
    _FINAL_CAP: _FINAL_CAP,
    _TIED: _TIED,
    **hf_rope.NAMES,
}
#: what transformers takes where a config leaves it out; the smaller Gemma 3 leave out nearly all
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    GEMMA2: {
        "head_dim": 256,
        "norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "max_seq_len": 8192,
        _WINDOW: 4096,
        _ATTENTION_CAP: 50.0,
        _FINAL_CAP: 30.0,
    },
    GEMMA3: {
        "head_dim": 256,
        "norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "max_seq_len": 131072,
        _WINDOW: 4096,
    },
}
#: one layer in so many sees all
_EVERY = {GEMMA2: 2, GEMMA3: 6}
_ARGUMENTS = {
    "model_type",
    *(name for name in _NAMES.values() if name not in hf_rope.NAMES.values()),
    *hf_rope.KEYS,
    _PATTERN,
    _OWN_PATTERN,
    # Whether a checkpoint's weights can be read is for its loader to say.
    "quantization",
    "quantization_config",
}
_KEYS = KnownKeys.of_config_json(
    dict.fromkeys(("hidden_act", "hidden_activation"), ("gelu_pytorch_tanh",))
    | dict.fromkeys(("attention_bias", "mlp_bias", "use_bidirectional_attention"), (False,)),
    r"max_sequence_length|model_max_length",
)


def read(raw: Mapping[str, Any], shapes: Shapes) -> ModelArgs | None:
    """The arguments out of a config.json, or None for one of another family.

    What it leaves out follows from the shapes where these tell, and else is what
    transformers takes. The head is the embedding where there is no
    ``lm_head.weight`` and ``tie_word_embeddings`` is not false.

    Args:
        raw: config.json of a checkpoint, of a model that sees only what it says of its text model.
        shapes: of its tensors by name.

    Raises:
        ModelError: values that are missing or impossible, and keys that may change what the
            model computes and are not built here, or not known; all told at once.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        return None
    told = _KEYS.faults(raw, _ARGUMENTS)
    values, wrong = _values(raw, kind, shapes)
    told += wrong
    try:
        args = parse(
            ModelArgs,
            {name: value for name, value in values.items() if value is not None},
            owner="gemma",
            spell=lambda name: _NAMES.get(name, name),
            strict=True,
        )
    except UsageError as fault:
        told.append(fault.what)
    if told:
        raise ModelError("; ".join(told))
    return args


def notes(raw: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What was assumed that a config.json usually states, and what of it does not count, in words."""
    kind = raw["model_type"]
    taken = {_NAMES[name]: value for name, value in _assumed(raw, kind, shapes).items()}
    taken |= hf_rope.assumed(raw, kind)
    told = []
    if taken:
        words = listing([f"{name} {value}" for name, value in taken.items()], len(taken))
        told.append(f"config.json leaves out {words}, which are taken as transformers has them")
    if raw.get(_TIED) is True and _HEAD in shapes:
        told.append(f"config.json says {_TIED}, but there is a {_HEAD}, which is used")
    return told


def _assumed(raw: Mapping[str, Any], kind: str, shapes: Shapes) -> dict[str, Any]:
    """argument -> value that neither the config nor a shape tells. A cap or window that is null is stated."""
    silent = {_WINDOW, _ATTENTION_CAP, _FINAL_CAP}
    found = {
        name: value
        for name, value in _DEFAULTS[kind].items()
        if (_NAMES[name] not in raw if name in silent else raw.get(_NAMES[name]) is None)
    }
    if _rows(shapes, f"{_FIRST}q_norm.weight"):
        found.pop("head_dim", None)
    return found


def _values(raw: Mapping[str, Any], kind: str, shapes: Shapes) -> tuple[dict[str, Any], list[str]]:
    """argument -> value, None where a model does without, and what is wrong with what they are made of."""
    plain = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps")
    more = ("query_pre_attn_scalar", "max_seq_len", _WINDOW, _ATTENTION_CAP, _FINAL_CAP)
    found = {name: raw.get(_NAMES[name]) for name in (*plain, *more)} | _assumed(raw, kind, shapes)
    if found["head_dim"] is None:
        found["head_dim"] = _rows(shapes, f"{_FIRST}q_norm.weight") or None
    if found["vocab_size"] is None:
        found["vocab_size"] = _rows(shapes, _EMBEDDING) or None
    for name, part in (("n_heads", "q"), ("n_kv_heads", "k")):
        if found[name] is None:
            found[name] = _part(_rows(shapes, f"{_FIRST}{part}_proj.weight"), _whole(found["head_dim"]))
    rope, told = hf_rope.read(raw, kind)
    layers = min(_whole(found["n_layers"]), MOST_LAYERS)
    bounded, faults = _bounded(raw, kind, layers)
    told += faults
    if found[_WINDOW] is None and bounded:
        told.append(f"{_WINDOW}: got none, but layers of {_SLIDING}")
    if layers and not bounded:  # a window is checked whatever the layers are
        found[_WINDOW] = None
    if found[_WINDOW] is None:
        rope.pop("sliding_rope_theta", None)
    if kind == GEMMA3 and found[_ATTENTION_CAP] is not None:
        cap = show_value(found[_ATTENTION_CAP])
        told.append(f"{_ATTENTION_CAP}: got {cap}, which transformers leaves out of a {GEMMA3}")
    tied = raw.get(_TIED)
    found |= rope | {
        "model_type": kind,
        "head_norms": True if kind == GEMMA3 else None,
        "window_layers": bounded if found[_WINDOW] is not None and len(bounded) != layers else None,
        _TIED: _HEAD not in shapes if tied is None or tied is True else tied,
    }
    return found, told


def _bounded(raw: Mapping[str, Any], kind: str, layers: int) -> tuple[tuple[int, ...], list[str]]:
    """The layers that the window bounds, and what is wrong with how they are stated."""
    kinds = raw.get(_KINDS)
    if kinds is not None:
        faults = _kind_faults(kinds, layers)
        return () if faults else tuple(i for i in range(layers) if kinds[i] == _SLIDING), faults
    stated = [key for key in (_PATTERN, _OWN_PATTERN) if raw.get(key) is not None and kind == GEMMA3]
    every = raw[stated[0]] if stated else _EVERY[kind]
    if type(every) is not int or every < 1:
        return (), [f"{stated[0]}: got {show_value(every)}, wanted a whole number of at least 1"]
    return tuple(layer for layer in range(layers) if (layer + 1) % every), []


def _kind_faults(kinds: Any, layers: int) -> list[str]:
    """What is wrong with the kinds of attention of the layers."""
    if not isinstance(kinds, list) or len(kinds) < layers:
        return [f"{_KINDS}: got {show_value(kinds)}, wanted a kind for each of {layers} layers"]
    other = sorted({show_key(str(kind)) for kind in kinds if kind not in (_FULL, _SLIDING)})[:3]
    if other:
        return [f"{_KINDS}: got {', '.join(other)}, but only {_FULL} and {_SLIDING} are built here"]
    return []


def _whole(value: Any) -> int:
    """A whole number above 0, or 0 for anything else."""
    return value if type(value) is int and value > 0 else 0


def _part(whole: int, count: int) -> int | None:
    """``whole / count`` where that is a whole number."""
    return whole // count if count and whole and not whole % count else None


def _rows(shapes: Shapes, name: str) -> int:
    """The rows of a tensor, or 0 where there is none."""
    return (shapes.get(name) or (0,))[0]
