"""The config.json of Hugging Face and mlx-lm that says what a model is: the way back of ``hf.read``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxlora_olmo2.config import ModelArgs


def write(args: ModelArgs) -> Mapping[str, Any]:
    """config.json of a model of ``args``, in both spellings of rotary positions."""
    longest = {} if args.max_seq_len is None else {"max_position_embeddings": args.max_seq_len}
    return {
        "architectures": ["Olmo2ForCausalLM"],
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
        "attention_bias": bool(args.attention_bias),
        "tie_word_embeddings": args.tie_word_embeddings,
        **longest,
        "rope_theta": args.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
    }
