"""The arguments of a Llama or Mistral out of the params.json of Meta and Mistral and the shapes beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxlora_core.api import ModelError, UsageError, parse
from mlxlora_core.files import KnownKeys, show_value
from mlxlora_llama.config import HEAD, MLP, ModelArgs

Shapes = Mapping[str, tuple[int, ...]]

_EMBEDDING = "tok_embeddings.weight"
_NORM = "norm.weight"
_TIED = "tie_word_embeddings"
_QUERIES = "layers.0.attention.wq.weight"
_KEYS = "layers.0.attention.wk.weight"
_LAYER = re.compile(r"layers\.([0-9]{1,6})\.")

#: the arguments that a params.json may state, under the same names
_ARGUMENTS = (
    "model_type",
    "dim",
    "n_layers",
    "head_dim",
    "hidden_dim",
    "n_heads",
    "n_kv_heads",
    "norm_eps",
    "vocab_size",
    "rope_theta",
    "sliding_window",
    "max_seq_len",
    _TIED,
)
# argument -> other names of it in a checkpoint's config, of which one is stated
_ALIASES = {
    "max_seq_len": ("max_position_embeddings", "max_seq_length", "max_sequence_length", "context_length"),
    "norm_eps": ("rms_norm_eps",),
    "sliding_window": ("_sliding_window",),
    _TIED: ("tied_embeddings", "tie_embeddings"),
}
#: whether the window counts that is stated beside it
_WINDOW_USED = "use_sliding_window"
#: whether rotary positions are scaled as Meta's own reader scales them, and by other factors than its own
_SCALED, _FACTOR, _HIGH = "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor"
_META_FACTOR, _META_LOW, _META_HIGH, _META_LEN = 8.0, 1.0, 4.0, 8192
_HONOURED = {
    *_ARGUMENTS,
    *(name for names in _ALIASES.values() for name in names),
    _WINDOW_USED,
}
_KEYS_THERE = KnownKeys(KnownKeys.COMMON, re.compile(KnownKeys.COMMON_HARMLESS))
#: what mistral-inference calls every model in a params.json
_MISTRAL_TYPE = "transformer"
_TYPES = ("llama", "mistral", _MISTRAL_TYPE)
_HUGGING_FACE, _THEIR_QUERIES = "hidden_size", "self_attn.q_proj"
_META_KEYS = ("multiple_of", "ffn_dim_multiplier")
_OWN_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", *_META_KEYS}
_THETA, _THETA_OF_MISTRAL = 1e4, 1e6


def read(raw: Mapping[str, Any], shapes: Shapes) -> ModelArgs | None:
    """The arguments out of a params.json, or None for a config of something else.

    What it leaves out, null among it, is derived: ``n_layers`` from the names of
    the tensors, ``dim`` from the last norm, ``n_heads`` from the rows of the first
    ``wq`` and ``head_dim``, or the other way round, ``n_kv_heads`` from the rows of
    the first ``wk``, ``hidden_dim`` from the rows of the first ``w1``,
    ``vocab_size``, absent or negative, from the rows of the head, and the head is
    the embedding when there is no ``output.weight`` and ``tie_word_embeddings`` is
    not false. ``rope_theta`` is that of the family; see :func:`notes`.

    Args:
        raw: params.json of a checkpoint.
        shapes: of its tensors by name.

    Raises:
        ModelError: values that are missing or impossible, and keys that may change what the
            model computes and are not built here, or not known; all told at once.
    """
    if not _is_mine(raw, shapes):
        return None
    if _HUGGING_FACE in raw:
        raise ModelError(
            f"is a config of Hugging Face ({_HUGGING_FACE}), wanted Meta's or Mistral's params.json"
        )
    if any(_THEIR_QUERIES in name for name in shapes):
        raise ModelError(
            f"the tensors are named as Hugging Face's ({_THEIR_QUERIES}), whose rows stand in another order, "
            "wanted Meta's or Mistral's own (attention.wq)"
        )
    scaling = _scaling(raw)
    told = _KEYS_THERE.faults(raw, _HONOURED | ({_SCALED, _FACTOR, _HIGH} if scaling else set()))
    told += _contradictions(raw)
    stated, names = _stated(raw)
    names |= {"rope_factor": _FACTOR, "rope_high_freq_factor": _HIGH} if scaling else {}
    values = _derived(raw, stated, shapes) | stated | scaling | {_TIED: _tied(stated, shapes)}
    if isinstance(window := values.get("sliding_window"), list):
        bounded, fault = _windows(window, _whole(values.get("n_layers")))
        told += [f"{names['sliding_window']}: {fault}"] if fault else []
        values |= bounded
    try:
        args = parse(ModelArgs, values, owner="llama", spell=lambda name: names.get(name, name), strict=True)
    except UsageError as fault:
        told.append(fault.what)
    if told:
        raise ModelError("; ".join(told))
    return args


def notes(raw: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """What was assumed or derived that a params.json usually states, in words."""
    stated, _ = _stated(raw)
    derived = _derived(raw, stated, shapes)
    told = []
    if "rope_theta" not in stated and not any(key in raw for key in _META_KEYS):
        why = "as Mistral's own reader has it" if _is_mistral(raw, stated) else "as Llama has it"
        told.append(
            f"params.json states no rope_theta: {derived['rope_theta']} is taken, {why}; "
            "state it there if the model was trained with another"
        )
    if raw.get(_SCALED) is True and raw.get(_FACTOR) is None:
        told.append(
            f"params.json says {_SCALED} and not by how much: {_META_FACTOR} is taken, as Meta's own reader "
            f"has it; state {_FACTOR} there if the model was trained with another"
        )
    read_off: list[str] = [
        key for key in ("dim", "n_layers", "n_heads") if key in derived and key not in stated
    ]
    if "n_kv_heads" not in stated and derived.get("n_kv_heads") != stated.get("n_heads"):
        read_off.append("n_kv_heads")
    if read_off:
        values = ", ".join(f"{key} {derived[key]}" for key in read_off if key in derived)
        told.append(f"params.json leaves out what the tensors tell: {values}")
    return told


def _scaling(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The scaled rotary positions that a params.json asks for, in Meta's numbers where it states none."""
    if raw.get(_SCALED) is not True:
        return {}
    factor, high = raw.get(_FACTOR), raw.get(_HIGH)
    return {
        "rope_scaling": "llama3",
        "rope_factor": _META_FACTOR if factor is None else factor,
        "rope_low_freq_factor": _META_LOW,
        "rope_high_freq_factor": _META_HIGH if high is None else high,
        "rope_original_len": _META_LEN,
    }


def _contradictions(raw: Mapping[str, Any]) -> list[str]:
    """The names of one argument that say different things."""
    told = []
    for argument, others in _ALIASES.items():
        said = {name: raw[name] for name in (argument, *others) if raw.get(name) is not None}
        first = next(iter(said), "")
        told += [
            f"{name}: got {show_value(value)}, but {first} is {show_value(said[first])}"
            for name, value in said.items()
            if name != first and value != said[first]
        ]
    return told


def _windows(pattern: list[Any], layers: int) -> tuple[dict[str, Any], str]:
    """The window of a list, which Mistral's own reader repeats up to the last layer, and what is wrong."""
    widths = {width for width in pattern if type(width) is int}
    single = len(widths) == 1 and all(width is None or type(width) is int for width in pattern)
    if not single or (layers and layers % len(pattern)):
        wanted = f"one width and nulls, as many as divide {layers} layers"
        return {"sliding_window": None}, f"got {show_value(pattern)}, wanted {wanted}"
    bounded = tuple(i for i in range(min(layers, 1024)) if pattern[i % len(pattern)] is not None)
    return {"sliding_window": widths.pop(), "window_layers": None if None not in pattern else bounded}, ""


def _stated(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """argument -> its value, and argument -> the name that it has in ``raw``; null counts as left out."""
    names = {
        argument: next(
            (name for name in (argument, *_ALIASES.get(argument, ())) if raw.get(name) is not None), ""
        )
        for argument in _ARGUMENTS
    }
    names = {argument: name for argument, name in names.items() if name}
    stated = {argument: raw[name] for argument, name in names.items()}
    if _negative(stated.get("vocab_size")):
        del stated["vocab_size"]
    if stated.get("model_type") == _MISTRAL_TYPE:
        del stated["model_type"]
    window = stated.get("sliding_window")
    if raw.get(_WINDOW_USED) is False or window is False or window in ([], {}):
        stated.pop("sliding_window", None)
    return stated, names


def _is_mine(raw: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether a config is one of Meta's or Mistral's own, whose keys are those of :class:`ModelArgs`.

    Where some of the three keys that mark it are missing, the tensors tell.
    """
    stated = raw.get("model_type")
    if stated is not None:
        return stated in _TYPES
    if {"dim", "n_layers", "n_heads"} <= raw.keys():
        return True
    known = raw.keys() & _OWN_KEYS and _HUGGING_FACE not in raw
    return bool(known) and {_KEYS, _QUERIES, _EMBEDDING} <= shapes.keys()


def _is_mistral(raw: Mapping[str, Any], stated: Mapping[str, Any]) -> bool:
    """Whether a config is laid out as Mistral's own are: widths, and not what Meta derives them from."""
    if raw.get("model_type") is not None:
        return bool(raw["model_type"] != "llama")
    return bool({"head_dim", "hidden_dim"} & stated.keys()) and not any(key in raw for key in _META_KEYS)


def _derived(raw: Mapping[str, Any], stated: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What follows from other values and from shapes, where these are such that anything follows."""
    queries, dim = _rows(shapes, _QUERIES), _whole(stated.get("dim")) or _rows(shapes, _NORM)
    heads, head_dim = (_whole(stated.get(key)) for key in ("n_heads", "head_dim"))
    heads = heads or _part(queries, head_dim)
    head_dim = head_dim or _part(queries or dim, heads) or _part(dim, heads)
    full = stated.get("sliding_window") is None
    found = {
        "model_type": "llama" if full else "mistral",
        "dim": dim,
        "n_layers": _layers(shapes),
        "head_dim": head_dim,
        "n_heads": heads,
        "n_kv_heads": _part(_rows(shapes, _KEYS), head_dim) or heads,
        "hidden_dim": _rows(shapes, MLP),
        "vocab_size": _rows(shapes, _EMBEDDING if _tied(stated, shapes) is True else HEAD),
        "rope_theta": _THETA_OF_MISTRAL if full and _is_mistral(raw, stated) else _THETA,
    }
    return {key: value for key, value in found.items() if value}


def _tied(stated: Mapping[str, Any], shapes: Shapes) -> Any:
    """Tied when stated, or when there is no head; a head that is there is used in any case."""
    tied = stated.get(_TIED, True)
    return HEAD not in shapes if tied is True else tied


def _layers(shapes: Shapes) -> int:
    """How many layers there are tensors of, or 0."""
    return max((int(match[1]) + 1 for name in shapes if (match := _LAYER.match(name))), default=0)


def _part(whole: int, count: int) -> int:
    """``whole / count`` where that is a whole number, else 0."""
    return whole // count if count and not whole % count else 0


def _whole(value: Any) -> int:
    """A whole number above 0, or 0 for anything else."""
    return value if type(value) is int and value > 0 else 0


def _rows(shapes: Shapes, name: str) -> int:
    """The rows of a tensor, or 0 where there is none."""
    return (shapes.get(name) or (0,))[0]


def _negative(value: Any) -> bool:
    return type(value) is int and value < 0
