"""What a Llama or Mistral is: its arguments, and how they are read from a checkpoint's config and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mlxlora_core.api import ModelError, UsageError, option, parse

MODEL_TYPES = ("llama", "mistral")

Shapes = Mapping[str, tuple[int, ...]]

_HEAD = "output.weight"
_EMBEDDING = "tok_embeddings.weight"
_KEYS = "layers.0.attention.wk.weight"
_MLP = "layers.0.feed_forward.w1.weight"

# Far beyond any model there is, and small enough that nothing overflows or is
# built at length because a file claims a large number.
_WIDEST = 1 << 20  # of a matrix in a layer; 64 times that of the largest Llama
_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class ModelArgs:
    """The arguments of a model: what its config.json holds."""

    model_type: str = option(help="llama or mistral", choices=MODEL_TYPES)
    dim: int = option(help="width, D", minimum=1, maximum=_WIDEST)
    n_layers: int = option(help="layers, L", minimum=1, maximum=1024)
    head_dim: int = option(help="even width of a head, E, or dim / n_heads", minimum=2, maximum=_WIDEST)
    hidden_dim: int = option(
        help=f"width of the feed-forward, F, or the rows of {_MLP}", minimum=1, maximum=_WIDEST
    )
    n_heads: int = option(help="query heads, H; a multiple of n_kv_heads", minimum=1, maximum=_WIDEST)
    n_kv_heads: int = option(help="key and value heads, K", minimum=1, maximum=_WIDEST)
    norm_eps: float = option(help="what RMSNorm adds to the mean square", minimum=1e-12, maximum=0.1)
    vocab_size: int = option(help=f"vocabulary, V, or the rows of {_HEAD}", minimum=1, maximum=1 << 24)
    rope_theta: float = option(1e4, help="base of the rotary wavelengths", minimum=1.0, maximum=1e12)
    sliding_window: int | None = option(
        None, help="tokens that a token sees, itself included", minimum=1, maximum=_LONGEST
    )
    max_seq_len: int | None = option(
        None, help="longest sequence it was made for", unit="tokens", minimum=1, maximum=_LONGEST
    )
    tie_word_embeddings: bool = option(False, help="whether the embedding is the output head too")

    def __post_init__(self) -> None:
        faults = []
        if self.n_heads % self.n_kv_heads:
            faults.append(f"n_kv_heads: got {self.n_kv_heads}, wanted a divisor of n_heads {self.n_heads}")
        if self.head_dim % 2:
            faults.append(f"head_dim: got {self.head_dim}, wanted an even number")
        if self.n_heads * self.head_dim > _WIDEST:
            got = f"n_heads: got {self.n_heads} of head_dim {self.head_dim}"
            faults.append(f"{got}, wanted a product of at most {_WIDEST}")
        if faults:
            raise ValueError("; ".join(faults))


# argument -> other names of it in a checkpoint's config
_ALIASES = {"max_seq_len": "max_position_embeddings"}

# Keys that change what a model computes in a way that is not built here. All
# other keys that are not known are about something else and are dropped.
_UNSUPPORTED = {
    "use_scaled_rope": "scaled rotary positions (Llama 3.1 and later)",
    "rope_scaling": "scaled rotary positions",
    "yarn": "scaled rotary positions",
    "moe": "a mixture of experts",
    "_sliding_window": "a sliding window under this name",
}


def read(raw: Mapping[str, Any], shapes: Shapes) -> ModelArgs | None:
    """The arguments out of a params.json, or None for a config of something else.

    What it leaves out, null among it, is derived: ``n_kv_heads`` from the rows of
    the first ``wk``, ``head_dim`` as ``dim / n_heads``, ``hidden_dim`` from the
    rows of the first ``w1``, ``vocab_size``, absent or negative, from the rows of
    the head, and the head is the embedding when there is no ``output.weight``
    and ``tie_word_embeddings`` is not false.

    Args:
        raw: params.json of a checkpoint.
        shapes: of its tensors by name.

    Raises:
        ModelError: values that are missing or impossible, and keys that change what the
            model computes in a way that is not supported; all told at once.
    """
    if not _is_mine(raw):
        return None
    faults = [
        f"{key}: got {_show(raw[key])}, but {what} is not supported"
        for key, what in _UNSUPPORTED.items()
        if raw.get(key)
    ]
    stated = {key: value for key, value in raw.items() if value is not None}
    names = {field.name: field.name for field in fields(ModelArgs)}
    names |= {argument: alias for argument, alias in _ALIASES.items() if argument not in stated}
    values = {argument: stated[name] for argument, name in names.items() if name in stated}
    if _negative(values.get("vocab_size")):
        del values["vocab_size"]
    values["tie_word_embeddings"] = _tied(values, shapes)
    values = _derived(values, shapes) | values
    try:
        args = parse(ModelArgs, values, owner="llama", spell=names.__getitem__, strict=True)
    except UsageError as fault:
        faults.append(fault.what)
    if faults:
        raise ModelError("; ".join(faults))
    return args


def _is_mine(raw: Mapping[str, Any]) -> bool:
    """Whether a config is one of Meta's or Mistral's own, whose keys are those of :class:`ModelArgs`."""
    stated = raw.get("model_type")
    if stated is not None:
        return stated in MODEL_TYPES
    return {"dim", "n_layers", "n_heads"} <= raw.keys()


def _tied(values: Mapping[str, Any], shapes: Shapes) -> Any:
    """Tied when stated, or when there is no head; a head that is there is used in any case."""
    stated = values.get("tie_word_embeddings", True)
    return _HEAD not in shapes if stated is True else stated


def _derived(values: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What follows from other values and from shapes, where these are such that anything follows."""
    dim, heads = (_whole(values.get(key)) for key in ("dim", "n_heads"))
    head_dim = _whole(values.get("head_dim")) or (dim // heads if heads and not dim % heads else 0)
    keys = _rows(shapes, _KEYS)
    found = {
        "model_type": "llama" if values.get("sliding_window") is None else "mistral",
        "head_dim": head_dim,
        "n_kv_heads": keys // head_dim if head_dim and keys and not keys % head_dim else heads,
        "hidden_dim": _rows(shapes, _MLP),
        "vocab_size": _rows(shapes, _EMBEDDING if values["tie_word_embeddings"] is True else _HEAD),
    }
    return {key: value for key, value in found.items() if value}


def _whole(value: Any) -> int:
    """A whole number above 0, or 0 for anything else."""
    return value if type(value) is int and value > 0 else 0


def _rows(shapes: Shapes, name: str) -> int:
    """The rows of a tensor, or 0 where there is none."""
    return (shapes.get(name) or (0,))[0]


def _negative(value: Any) -> bool:
    return type(value) is int and value < 0


def _show(value: Any) -> str:
    """``value`` in at most some 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
