"""The config.json of Hugging Face and mlx-lm: the arguments out of it, in both spellings of the rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxlora_core.api import ModelError, UsageError, parse
from mlxlora_core.files import KnownKeys, show_key, show_value
from mlxlora_llama import hf_rope
from mlxlora_llama.config import ModelArgs

Shapes = Mapping[str, tuple[int, ...]]

_HEAD, _TIED = "lm_head.weight", "tie_word_embeddings"
_FIRST = "model.layers.0.self_attn."
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
    "sliding_window": "sliding_window",
    "window_layers": "layer_types",
    "unrotated_layers": "no_rope_layers",
    _TIED: _TIED,
    **hf_rope.NAMES,
}
_EVERY_FAMILY = {
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    _TIED,
    *hf_rope.KEYS,
}
_WINDOW_USED, _WINDOW_FROM, _UNROTATED_STEP = (
    "use_sliding_window",
    "max_window_layers",
    "no_rope_layer_interval",
)
_WINDOWS = {"sliding_window", "layer_types"}
_UNROTATED = {"no_rope_layers", _UNROTATED_STEP}
_ATTENTION_BIAS, _MLP_BIAS = "attention_bias", "mlp_bias"
#: what transformers takes where a config of the family does not say
_WINDOW_OF_MISTRAL, _FROM_OF_QWEN, _STEP_OF_SMOLLM3 = 4096, 28, 4
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class _Family:
    """What the configs of a family may say, and what they leave unsaid.

    Attributes:
        keys: beside those that every family has.
        biases: of linears, without being asked.
        head_norms: whether each head of queries and keys is normalised.
    """

    keys: frozenset[str]
    biases: tuple[str, ...] = ()
    head_norms: bool | None = None


_FAMILIES = {
    "llama": _Family(frozenset({_ATTENTION_BIAS, _MLP_BIAS})),
    "mistral": _Family(frozenset({*_WINDOWS, _WINDOW_USED})),
    "qwen2": _Family(frozenset({*_WINDOWS, _WINDOW_USED, _WINDOW_FROM, _ATTENTION_BIAS}), ("wq", "wk", "wv")),
    "qwen3": _Family(frozenset({*_WINDOWS, _WINDOW_USED, _WINDOW_FROM, _ATTENTION_BIAS}), head_norms=True),
    "smollm3": _Family(
        frozenset({*_WINDOWS, _WINDOW_USED, _WINDOW_FROM, *_UNROTATED, _ATTENTION_BIAS, _MLP_BIAS})
    ),
}

# A mistral whose windows differ from layer to layer is a ministral there.
_FAMILIES["ministral"] = _FAMILIES["mistral"]
#: the families of which a config.json is read
MODEL_TYPES = tuple(_FAMILIES)

_KEYS = KnownKeys.of_config_json(
    harmless=r"is_llama_config|max_window_layers|max_sequence_length|model_max_length|layer_norm_eps"
)


def read(raw: Mapping[str, Any], shapes: Shapes) -> ModelArgs | None:
    """The arguments out of a config.json, or None for one of another family.

    The width of a head and the number of key heads, where it leaves them out or
    null, follow from the rows of the first layer's projections. The head is the
    embedding where there is no ``lm_head.weight`` and ``tie_word_embeddings`` is
    not false.

    Args:
        raw: config.json of a checkpoint, without what its loader has dealt with.
        shapes: of its tensors by name.

    Raises:
        ModelError: values that are missing or impossible, and keys that may change what the
            model computes and are not built here, or not known; all told at once.
    """
    family = _FAMILIES.get(raw["model_type"]) if isinstance(raw.get("model_type"), str) else None
    if family is None:
        return None
    told = _KEYS.faults(raw, _EVERY_FAMILY | family.keys)
    values, wrong = _values(raw, family, shapes)
    told += wrong
    try:
        args = parse(ModelArgs, values, owner="llama", spell=lambda name: _NAMES.get(name, name), strict=True)
    except UsageError as fault:
        told.append(fault.what)
    if told:
        raise ModelError("; ".join(told))
    return args


def notes(raw: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What was assumed that a config.json usually states, and what of it does not count, in words."""
    told = hf_rope.notes(raw)
    if _FAMILIES[raw["model_type"]] is _FAMILIES["mistral"] and not _WINDOWS & raw.keys():
        told.append(
            f"config.json states no sliding_window: {_WINDOW_OF_MISTRAL} is taken, as transformers has it"
        )
    if raw.get(_TIED) is True and _HEAD in shapes:
        told.append(f"config.json says {_TIED}, but there is a {_HEAD}, which is used")
    return told


def _values(raw: Mapping[str, Any], family: _Family, shapes: Shapes) -> tuple[dict[str, Any], list[str]]:
    """argument -> value, None left out, and what is wrong with what they are made of."""
    plain = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps")
    found = {name: raw.get(_NAMES[name]) for name in (*plain, "max_seq_len")}
    heads, dim = _whole(found["n_heads"]), _whole(found["dim"])
    queries, keys = (_rows(shapes, f"{_FIRST}{name}_proj.weight") for name in "qk")
    if found["head_dim"] is None:
        found["head_dim"] = _part(queries or dim, heads)
    if found["n_kv_heads"] is None:
        found["n_kv_heads"] = _part(keys, _whole(found["head_dim"])) or heads or None
    rope, wrong = hf_rope.read(raw)
    layers, faults = _layers(raw, family, min(_whole(found["n_layers"]), 1024))
    faults += [
        f"{key}: got {show_value(raw[key])}, wanted true or false"
        for key in (_ATTENTION_BIAS, _MLP_BIAS, _WINDOW_USED)
        if key in family.keys and raw.get(key) is not None and not isinstance(raw[key], bool)
    ]
    tied = raw.get(_TIED)
    values = {
        **found,
        **rope,
        **layers,
        "model_type": "mistral" if family is _FAMILIES["mistral"] else raw["model_type"],
        "biases": _biases(raw, family),
        "head_norms": family.head_norms,
        _TIED: _HEAD not in shapes if tied is None or tied is True else tied,
    }
    return {name: value for name, value in values.items() if value is not None}, [*wrong, *faults]


def _biases(raw: Mapping[str, Any], family: _Family) -> tuple[str, ...] | None:
    """The linears that have a bias."""
    names = list(family.biases)
    if raw.get(_ATTENTION_BIAS) is True and not names:
        names = ["wq", "wk", "wv", "wo"]
    if raw.get(_MLP_BIAS) is True:
        names += ["w1", "w2", "w3"]
    return tuple(names) or None


def _layers(raw: Mapping[str, Any], family: _Family, layers: int) -> tuple[dict[str, Any], list[str]]:
    """The window and the layers that it bounds, and the layers without positions."""
    unrotated, told = _unrotated(raw, family, layers)
    found: dict[str, Any] = {"unrotated_layers": unrotated or None}
    window = _window(raw, family)
    bounded, faults = _bounded(raw, family, layers, unrotated)
    told += faults
    if window is None and bounded and raw.get("layer_types") is not None:
        told.append(f"layer_types: got {_SLIDING}, but there is no sliding_window that is used")
    if window is not None and (bounded or not layers):  # a window is checked whatever the layers are
        found["sliding_window"] = window
        found["window_layers"] = None if len(bounded) == layers else bounded
    return found, told


def _window(raw: Mapping[str, Any], family: _Family) -> Any:
    """The window that counts in some layers, or None."""
    window = raw.get("sliding_window")
    if family is _FAMILIES["mistral"]:
        window = raw.get("sliding_window", _WINDOW_OF_MISTRAL)
        return None if raw.get(_WINDOW_USED) is False or window is False else window
    used = "sliding_window" in family.keys and raw.get(_WINDOW_USED) is True
    return window if used and window is not False else None


def _bounded(
    raw: Mapping[str, Any], family: _Family, layers: int, unrotated: tuple[int, ...]
) -> tuple[tuple[int, ...], list[str]]:
    """The layers that a window bounds, if there is one, and what is wrong with how they are stated."""
    kinds = raw.get("layer_types")
    if kinds is not None and "layer_types" in family.keys:
        faults = _kind_faults(kinds, layers)
        return () if faults else tuple(i for i, kind in enumerate(kinds[:layers]) if kind == _SLIDING), faults
    if family.keys & _UNROTATED:
        return unrotated, []
    if family is _FAMILIES["mistral"]:
        return tuple(range(layers)), []
    start = _FROM_OF_QWEN if raw.get(_WINDOW_FROM) is None else raw[_WINDOW_FROM]
    if type(start) is not int or start < 0:
        return (), [f"{_WINDOW_FROM}: got {show_value(start)}, wanted a whole number of at least 0"]
    return tuple(range(min(start, layers), layers)), []


def _unrotated(raw: Mapping[str, Any], family: _Family, layers: int) -> tuple[tuple[int, ...], list[str]]:
    """The layers without rotary positions."""
    if not family.keys & _UNROTATED:
        return (), []
    marks = raw.get("no_rope_layers")
    if marks is None:
        step = _STEP_OF_SMOLLM3 if raw.get(_UNROTATED_STEP) is None else raw[_UNROTATED_STEP]
        if type(step) is not int or step < 1:
            return (), [f"{_UNROTATED_STEP}: got {show_value(step)}, wanted a whole number of at least 1"]
        return tuple(range(step - 1, layers, step)), []
    good = isinstance(marks, list) and all(type(mark) in (int, bool) and mark in (0, 1) for mark in marks)
    if not good or len(marks) < layers:
        return (), [f"no_rope_layers: got {show_value(marks)}, wanted a 0 or 1 for each of {layers} layers"]
    return tuple(layer for layer in range(layers) if not marks[layer]), []


def _kind_faults(kinds: Any, layers: int) -> list[str]:
    """What is wrong with the kinds of attention of the layers."""
    if not isinstance(kinds, list) or len(kinds) < layers:
        return [f"layer_types: got {show_value(kinds)}, wanted a kind for each of {layers} layers"]
    other = sorted({show_key(str(kind)) for kind in kinds if kind not in (_FULL, _SLIDING)})[:3]
    if other:
        return [f"layer_types: got {', '.join(other)}, but only {_FULL} and {_SLIDING} are built here"]
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
