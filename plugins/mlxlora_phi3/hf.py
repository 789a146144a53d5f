"""The config.json of Hugging Face and mlx-lm: the arguments out of it, in both spellings of the rope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from mlxlora_core.api import ModelError, UsageError, parse
from mlxlora_core.files import KnownKeys, show_key, show_value, stated_rope
from mlxlora_phi3.config import ModelArgs
from mlxlora_phi3.rope import attention_factor

Shapes = Mapping[str, tuple[int, ...]]

MODEL_TYPES = ("phi3",)

_HEAD, _TIED, _THETA, _PART = "lm_head.weight", "tie_word_embeddings", "rope_theta", "partial_rotary_factor"
_ORIGINAL, _LONGEST = "original_max_position_embeddings", "max_position_embeddings"
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
    "max_seq_len": _LONGEST,
    "sliding_window": "sliding_window",
    "rotary_dim": _PART,
    "rope_theta": _THETA,
    "rope_original_len": _ORIGINAL,
    "rope_short_divisors": "short_factor",
    "rope_long_divisors": "long_factor",
    "rope_attention_factor": "attention_factor",
    _TIED: _TIED,
}
_HONOURED = {"model_type", "rope_parameters", "rope_scaling", *_NAMES.values()} - {
    "short_factor",
    "long_factor",
    "attention_factor",
}
_ROPE = {"rope_type", "factor", "short_factor", "long_factor", "attention_factor"} | {
    _THETA,
    _PART,
    _ORIGINAL,
}
# What Phi-4-mini states of its making; 1 is nothing.
_KEYS = KnownKeys.of_config_json(
    {"full_attn_mod": (1,), "interpolate_factor": (1,)}, harmless="(resid|embd)_pdrop"
)
_LONGROPE = ("longrope", "su")


def read(raw: Mapping[str, Any], shapes: Shapes) -> ModelArgs | None:
    """The arguments out of a config.json, or None for one of another family.

    The head is the embedding where there is no ``lm_head.weight`` and
    ``tie_word_embeddings`` is not false.

    Args:
        raw: config.json of a checkpoint, without what its loader has dealt with.
        shapes: of its tensors by name.

    Raises:
        ModelError: values that are missing or impossible, and keys that may change what the
            model computes and are not built here, or not known; all told at once.
    """
    if raw.get("model_type") not in MODEL_TYPES:
        return None
    told = _KEYS.faults(raw, _HONOURED)
    values = {name: raw.get(_NAMES[name]) for name in ("n_layers", "hidden_dim", "vocab_size", "norm_eps")}
    values |= {name: raw.get(_NAMES[name]) for name in ("max_seq_len", "sliding_window", "dim", "n_heads")}
    heads, dim = _whole(values["n_heads"]), _whole(values["dim"])
    width = raw.get("head_dim")
    if width is None and heads and not dim % heads:
        width = dim // heads or None
    keys = raw.get(_NAMES["n_kv_heads"])
    tied = raw.get(_TIED)
    rope, wrong = _rope(raw, _whole(width))
    values |= {
        "model_type": raw["model_type"],
        "head_dim": width,
        "n_kv_heads": values["n_heads"] if keys is None else keys,
        _TIED: _HEAD not in shapes if tied is None or tied is True else tied,
        **rope,
    }
    told += wrong
    try:
        args = parse(
            ModelArgs,
            {name: value for name, value in values.items() if value is not None},
            owner="phi3",
            spell=lambda name: _NAMES.get(name, name),
            strict=True,
        )
    except UsageError as fault:
        told.append(fault.what)
    if told:
        raise ModelError("; ".join(told))
    return args


def notes(raw: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What of a config.json does not count, and what its owner may not expect, in words."""
    told = []
    if raw.get(_TIED) is True and _HEAD in shapes:
        told.append(f"config.json says {_TIED}, but there is a {_HEAD}, which is used")
    stated, _ = stated_rope(raw)
    if stated.get("rope_type") in _LONGROPE:
        told.append(
            f"positions turn in one way in texts of up to {stated[_ORIGINAL]} tokens and in another in "
            "longer ones, as transformers has it; a row is as long as the longest of its batch"
        )
    return told


def _rope(raw: Mapping[str, Any], width: int) -> tuple[dict[str, Any], list[str]]:
    """argument -> value of all that is about rotary positions, and what is wrong."""
    stated, told = stated_rope(raw)
    if raw.get(_PART) is not None and stated.setdefault(_PART, raw[_PART]) != raw[_PART]:
        told.append(f"{_PART}: got both {show_value(stated[_PART])} and {show_value(raw[_PART])}")
    kind = stated.get("rope_type", "default")
    told += [
        f"rope_parameters: unknown: {show_key(str(key))} {show_value(value)}"
        for key, value in stated.items()
        if key not in _ROPE
    ][:4]
    found: dict[str, Any] = {_THETA: stated.get(_THETA)}
    part = stated.get(_PART, 1)
    if not _positive(part) or part > 1:
        told.append(f"{_PART}: got {show_value(part)}, wanted a number above 0 and at most 1")
    elif part != 1:
        found["rotary_dim"] = int(width * part) or None
    if kind == "default":
        return found, told
    if kind not in _LONGROPE:
        told.append(f"rope_type: got {show_value(kind)}, but only default and longrope are built here")
        return found, told
    if stated.get("factor") is not None and not _positive(stated["factor"]):
        told.append(f"factor: got {show_value(stated['factor'])}, wanted a number above 0")
    needed = [name for name in (_ORIGINAL, "short_factor", "long_factor") if stated.get(name) is None]
    if stated.get("factor") is None and stated.get("attention_factor") is None and raw.get(_LONGEST) is None:
        needed.append(_LONGEST)
    if needed:
        return found, [*told, *(f"{name} is required by rope_type longrope" for name in needed)]
    return found | _longrope(stated, raw), told


def _longrope(stated: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the scaling, with what transformers takes where they are not stated."""
    original, factor, growth = stated[_ORIGINAL], stated.get("attention_factor"), stated.get("factor")
    if growth is None and _positive(original) and _positive(raw.get(_LONGEST)):
        growth = raw[_LONGEST] / original
    if factor is None:  # of values that are impossible, none: those are told
        factor = 1.0
        if _positive(growth) and _positive(original):
            factor = attention_factor(growth, int(original))
    return {
        "rope_original_len": original,
        "rope_short_divisors": stated["short_factor"],
        "rope_long_divisors": stated["long_factor"],
        "rope_attention_factor": factor,
    }


def _whole(value: Any) -> int:
    """A whole number above 0 that a model may have, or 0 for anything else."""
    return value if type(value) is int and 0 < value < 1 << 31 else 0


def _positive(value: Any) -> TypeGuard[float]:
    """Whether it is a number above 0 that can be computed with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e15
