"""The config.json of Hugging Face and mlx-lm that says what a model is: the way back of ``hf.read``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlxlora_phi3.config import ModelArgs

_THETA, _PART = "rope_theta", "partial_rotary_factor"
_ORIGINAL, _LONGROPE = "original_max_position_embeddings", "longrope"


def write(args: ModelArgs) -> Mapping[str, Any]:
    """config.json of a model of ``args``, in both spellings of rotary positions."""
    longest = {} if args.max_seq_len is None else {"max_position_embeddings": args.max_seq_len}
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": args.model_type,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": args.sliding_window,
        "tie_word_embeddings": args.tie_word_embeddings,
        **longest,
        **_rope(args),
    }


def _rope(args: ModelArgs) -> dict[str, Any]:
    """The keys that state rotary positions."""
    part = _part(args)
    found: dict[str, Any] = {_THETA: args.rope_theta, _PART: part}
    table: dict[str, Any] = {"rope_type": "default", _THETA: args.rope_theta, _PART: part}
    if args.rope_original_len is None:
        return {**found, "rope_scaling": None, "rope_parameters": table}
    scaling = {
        "rope_type": _LONGROPE,
        "short_factor": list(args.rope_short_divisors or ()),
        "long_factor": list(args.rope_long_divisors or ()),
        "attention_factor": args.rope_attention_factor,
        _ORIGINAL: args.rope_original_len,
    }
    # mlx-lm and older versions of transformers ask for "type", and for the length outside of the table.
    old = {"type": _LONGROPE, **scaling}
    return {
        **found,
        _ORIGINAL: args.rope_original_len,
        "rope_scaling": old,
        "rope_parameters": {**table, **scaling},
    }


def _part(args: ModelArgs) -> float:
    """The share of a head that is turned, of which a reader finds the same whole number of features."""
    part = args.turned / args.head_dim
    return part if int(args.head_dim * part) == args.turned else math.nextafter(part, 1.0)
