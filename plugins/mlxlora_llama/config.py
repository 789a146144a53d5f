"""What a Llama or Mistral is: read from a config, derived from tensor shapes, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxlora_core.api import ModelError

MODEL_TYPES = ("llama", "mistral")

Shapes = Mapping[str, tuple[int, ...]]

_HEAD = "output.weight"
_EMBEDDING = "tok_embeddings.weight"
_MLP = "layers.0.feed_forward.w1.weight"
_WIDEST = 1 << 20  # of a matrix in a layer; 64 times that of the largest Llama


@dataclass(frozen=True)
class ModelArgs:
    """The arguments of a model, which are also the fields of its config.json.

    Attributes:
        model_type: ``llama`` or ``mistral``.
        dim: D.
        n_layers: L.
        head_dim: E, even.
        hidden_dim: F.
        n_heads: H, a multiple of K.
        n_kv_heads: K.
        norm_eps: what RMSNorm adds to the mean square.
        vocab_size: V.
        rope_theta: base of the rotary wavelengths.
        sliding_window: tokens that a token sees, itself included; None is all before it.
        max_seq_len: longest sequence it was made for, in tokens, or None.
        tie_word_embeddings: whether the embedding is the output head too.
    """

    model_type: str
    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    rope_theta: float = 10000.0
    sliding_window: int | None = None
    max_seq_len: int | None = None
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class _Range:
    """Numbers from ``low`` to ``high``: whole ones if both are."""

    low: float
    high: float

    def __str__(self) -> str:
        kind = "whole number" if isinstance(self.low, int) else "number"
        return f"a {kind} from {self.low} to {self.high}"

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is such a number; true and false are none."""
        kinds = (int,) if isinstance(self.low, int) else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high


# Far beyond any model there is, and small enough that nothing overflows or is
# built at length because a file claims a large number.
_RANGES = {
    "dim": _Range(1, _WIDEST),
    "n_layers": _Range(1, 1024),
    "head_dim": _Range(2, _WIDEST),
    "hidden_dim": _Range(1, _WIDEST),
    "n_heads": _Range(1, _WIDEST),
    "n_kv_heads": _Range(1, _WIDEST),
    "norm_eps": _Range(1e-12, 0.1),
    "vocab_size": _Range(1, 1 << 24),
    "rope_theta": _Range(1.0, 1e12),
    "sliding_window": _Range(1, 2**31 - 1),
    "max_seq_len": _Range(1, 2**31 - 1),
}
_ALIASES = {"max_seq_len": "max_position_embeddings"}
_REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")

# Keys that change what a model computes in a way that is not built here. All
# other keys that are not known are about something else and are dropped.
_UNSUPPORTED = {
    "use_scaled_rope": "scaled rotary positions (Llama 3.1 and later)",
    "rope_scaling": "scaled rotary positions",
    "yarn": "scaled rotary positions",
    "moe": "a mixture of experts",
}


def detect(raw: Mapping[str, Any]) -> str | None:
    """The model_type of a params.json, which states none: ``mistral``, ``llama`` or None for another's."""
    if raw.get("model_type") is not None or not {"dim", "n_layers", "n_heads"} <= raw.keys():
        return None
    return "llama" if raw.get("sliding_window") is None else "mistral"


def model_args(raw: Mapping[str, Any], shapes: Shapes) -> ModelArgs:
    """Checked arguments of a model.

    What ``raw`` leaves out is derived: ``n_kv_heads`` is ``n_heads``, ``head_dim``
    is ``dim / n_heads``, ``hidden_dim`` the rows of the first ``w1``,
    ``vocab_size``, absent or negative, the rows of the head, and the head is tied
    to the embedding when there is no ``output.weight`` among ``shapes`` and
    ``tie_word_embeddings`` is not false.

    Args:
        raw: params.json of a checkpoint, or a config.json that mlxlora wrote.
        shapes: of the tensors by name; empty for a config.json.

    Raises:
        ModelError: values that are missing or impossible, all of them told at once.
    """
    faults: dict[str, str] = {
        key: f"got {_show(raw[key])}, but {what} is not supported"
        for key, what in _UNSUPPORTED.items()
        if raw.get(key)
    }
    values = _stated(raw, faults)
    values["model_type"] = _model_type(raw, faults)
    values["tie_word_embeddings"] = _tied(raw, shapes, faults)
    for key in _REQUIRED:
        if key not in values:
            faults.setdefault(key, f"is missing, wanted {_RANGES[key]}")
    _derive(values, shapes, faults)
    _relate(values, faults)
    if faults:
        raise ModelError("; ".join(f"{key}: {fault}" for key, fault in faults.items()))
    return ModelArgs(**values)


def _stated(raw: Mapping[str, Any], faults: dict[str, str]) -> dict[str, Any]:
    """The numbers that ``raw`` gives and that are possible; null counts as left out."""
    values: dict[str, Any] = {}
    for key, range_ in _RANGES.items():
        name = key if raw.get(key) is not None else _ALIASES.get(key, key)
        value = raw.get(name)
        if value is None or (key == "vocab_size" and _negative(value)):
            continue
        if range_.holds(value):
            values[key] = value if isinstance(range_.low, int) else float(value)
        else:
            faults[name] = f"got {_show(value)}, wanted {range_}"
    return values


def _model_type(raw: Mapping[str, Any], faults: dict[str, str]) -> str:
    stated = raw.get("model_type")
    if stated is None:
        stated = detect(raw)
    if stated not in MODEL_TYPES:
        faults["model_type"] = f"got {_show(stated)}, wanted {' or '.join(MODEL_TYPES)}"
    return str(stated)


def _tied(raw: Mapping[str, Any], shapes: Shapes, faults: dict[str, str]) -> bool:
    """Tied when stated, or when there is no head; a head that is there is used in any case."""
    stated = raw.get("tie_word_embeddings")
    if not (stated is None or isinstance(stated, bool)):
        faults["tie_word_embeddings"] = f"got {_show(stated)}, wanted true or false"
    if shapes:
        return _HEAD not in shapes and stated is not False
    return bool(stated)


def _derive(values: dict[str, Any], shapes: Shapes, faults: dict[str, str]) -> None:
    """Fill what was left out in, from what was stated and from shapes."""
    sources: dict[str, tuple[int | None, str]] = {
        "hidden_dim": _rows(shapes, _MLP),
        "vocab_size": _rows(shapes, _EMBEDDING if values["tie_word_embeddings"] else _HEAD),
    }
    dim, heads = values.get("dim"), values.get("n_heads")
    if heads:
        sources["n_kv_heads"] = (heads, "n_heads")
    if dim and heads:
        sources["head_dim"] = (None if dim % heads else dim // heads, f"dim {dim} / n_heads {heads}")
    for key, (value, source) in sources.items():
        if key in values or key in faults:
            continue
        if _RANGES[key].holds(value):
            values[key] = value
        else:
            got = "is missing and does not follow from" if value is None else f"got {value} from"
            faults[key] = f"{got} {source}, wanted {_RANGES[key]}"


def _relate(values: Mapping[str, Any], faults: dict[str, str]) -> None:
    """What must hold between values that are each possible."""
    heads, kv_heads, head_dim = (values.get(key) for key in ("n_heads", "n_kv_heads", "head_dim"))
    if heads and kv_heads and heads % kv_heads:
        faults["n_kv_heads"] = f"got {kv_heads}, wanted a divisor of n_heads {heads}"
    if head_dim and head_dim % 2:
        faults["head_dim"] = f"got {head_dim}, wanted an even number"
    if heads and head_dim and heads * head_dim > _WIDEST:
        faults["n_heads"] = f"got {heads} of head_dim {head_dim}, wanted a product of at most {_WIDEST}"


def _rows(shapes: Shapes, name: str) -> tuple[int | None, str]:
    """The rows of a tensor, if it is there, and how to call them."""
    shape = shapes.get(name)
    return (shape[0] if shape else None), f"the rows of {name}"


def _negative(value: Any) -> bool:
    return isinstance(value, int) and value < 0


def _show(value: Any) -> str:
    """``value`` in at most some 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
