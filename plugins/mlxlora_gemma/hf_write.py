"""The config.json of Hugging Face and mlx-lm that says what a model is: the way back of ``hf.read``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxlora_core.api import ModelError
from mlxlora_gemma.config import GEMMA2, GEMMA3, ModelArgs
from mlxlora_gemma.hf_rope import written

_CLASSES = {GEMMA2: "Gemma2ForCausalLM", GEMMA3: "Gemma3ForCausalLM"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_GELU = "gelu_pytorch_tanh"


def write(args: ModelArgs) -> Mapping[str, Any]:
    """config.json of a model of ``args``, in both spellings of rotary positions.

    Raises:
        ModelError: arguments that no config of the family says there, all told at once.
    """
    told = _faults(args)
    if told:
        raise ModelError(f"Hugging Face has no {args.model_type} that is such: " + "; ".join(told))
    scalar = args.query_pre_attn_scalar
    return {
        "architectures": [_CLASSES[args.model_type]],
        "model_type": args.model_type,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        # transformers takes a whole number here and nothing else
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "hidden_act": _GELU,
        "hidden_activation": _GELU,
        "attention_bias": False,
        "tie_word_embeddings": args.tie_word_embeddings,
        "max_position_embeddings": args.max_seq_len,
        "attn_logit_softcapping": args.attn_logit_softcapping,
        "final_logit_softcapping": args.final_logit_softcapping,
        **_layers(args),
        **written(args),
    }


def _faults(args: ModelArgs) -> list[str]:
    """What a family has not there."""
    told = []
    if bool(args.head_norms) != (args.model_type == GEMMA3):
        told.append("norms of each head of queries and keys" if args.head_norms else "no norms of heads")
    if args.model_type == GEMMA3 and args.attn_logit_softcapping is not None:
        told.append("scores of attention that stay below a cap")
    if args.model_type == GEMMA2 and args.sliding_rope_theta is not None:
        told.append("a base of rotary wavelengths of its own for layers with a window")
    if args.model_type == GEMMA3 and args.sliding_window is not None and args.sliding_rope_theta is None:
        told.append("layers with a window that have no base of rotary wavelengths of their own")
    if args.max_seq_len is None:
        told.append("no longest sequence")
    return told


def _layers(args: ModelArgs) -> dict[str, Any]:
    """The window and the layers that it bounds; the pattern is that of mlx-lm and of older versions."""
    kinds = [_FULL if args.window(layer) is None else _SLIDING for layer in range(args.n_layers)]
    found: dict[str, Any] = {"sliding_window": args.sliding_window, "layer_types": kinds}
    every = kinds.index(_FULL) + 1 if _FULL in kinds else args.n_layers + 1
    regular = all((kind == _FULL) == ((layer + 1) % every == 0) for layer, kind in enumerate(kinds))
    return found | ({"sliding_window_pattern": every} if args.model_type == GEMMA3 and regular else {})
