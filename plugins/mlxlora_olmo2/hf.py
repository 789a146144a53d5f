"""The config.json of Hugging Face and mlx-lm: the arguments out of it, in both spellings of the rope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxlora_core.api import ModelError, UsageError, parse
from mlxlora_core.files import KnownKeys, show_key, show_value, stated_rope
from mlxlora_olmo2.config import ModelArgs

Shapes = Mapping[str, tuple[int, ...]]

MODEL_TYPES = ("olmo2",)

_HEAD, _TIED, _THETA, _BIAS = "lm_head.weight", "tie_word_embeddings", "rope_theta", "attention_bias"
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
    "max_seq_len": "max_position_embeddings",
    _THETA: _THETA,
    _BIAS: _BIAS,
    _TIED: _TIED,
}
_HONOURED = {"model_type", "rope_parameters", "rope_scaling", *_NAMES.values()}
_KEYS = KnownKeys.of_config_json()


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
    theta, wrong = _theta(raw)
    told = _KEYS.faults(raw, _HONOURED) + wrong
    values = {name: raw.get(key) for name, key in _NAMES.items()}
    heads, dim = _whole(values["n_heads"]), _whole(values["dim"])
    if values["head_dim"] is None and heads and not dim % heads:
        values["head_dim"] = dim // heads or None
    if values["n_kv_heads"] is None:
        values["n_kv_heads"] = values["n_heads"]
    if values[_TIED] is None or values[_TIED] is True:
        values[_TIED] = _HEAD not in shapes
    if values[_BIAS] is False:
        values[_BIAS] = None
    values |= {"model_type": raw["model_type"], _THETA: theta}
    try:
        args = parse(
            ModelArgs,
            {name: value for name, value in values.items() if value is not None},
            owner="olmo2",
            spell=lambda name: _NAMES.get(name, name),
            strict=True,
        )
    except UsageError as fault:
        told.append(fault.what)
    if told:
        raise ModelError("; ".join(told))
    return args


def notes(raw: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What of a config.json does not count, in words."""
    if raw.get(_TIED) is True and _HEAD in shapes:
        return [f"config.json says {_TIED}, but there is a {_HEAD}, which is used"]
    return []


def _theta(raw: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The base of the rotary wavelengths, and what is wrong with what is said of rotary positions."""
    stated, told = stated_rope(raw)
    kind = stated.pop("rope_type", "default")
    theta = stated.pop(_THETA, None)
    if stated.get("partial_rotary_factor") == 1:
        del stated["partial_rotary_factor"]
    if kind != "default":
        told.append(f"rope_type: got {show_value(kind)}, but only default is built here")
    elif stated:
        told += [f"rope_parameters: unknown: {show_key(str(k))} {show_value(v)}" for k, v in stated.items()][
            :4
        ]
    return theta, told


def _whole(value: Any) -> int:
    """A whole number above 0 that a model may have, or 0 for anything else."""
    return value if type(value) is int and 0 < value < 1 << 31 else 0
