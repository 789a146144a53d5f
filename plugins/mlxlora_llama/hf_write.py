"""The config.json of Hugging Face and mlx-lm that says what a model is: the way back of ``hf.read``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxlora_core.api import ModelError
from mlxlora_llama.config import ModelArgs
from mlxlora_llama.hf_rope import written

#: ``model_type`` there -> the class that transformers, vLLM and llama.cpp go by
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_ATTENTION, _MLP = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3")
#: family -> biases that it has unasked, and whether a config asks for those of attention, of the feed-forward
_BIASES = {
    "llama": ((), True, True),
    "mistral": ((), False, False),
    "qwen2": (("wq", "wk", "wv"), False, False),
    "qwen3": ((), True, False),
    "smollm3": ((), True, True),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def write(args: ModelArgs) -> Mapping[str, Any]:
    """config.json of a model of ``args``, in both spellings of rotary positions.

    Raises:
        ModelError: arguments that no config of the family says there, all told at once.
    """
    told = list(_faults(args))
    rope, fault = written(args)
    told += [fault] if fault else []
    if told:
        raise ModelError(f"Hugging Face has no {args.model_type} that is such: " + "; ".join(told))
    kind = "ministral" if args.model_type == "mistral" and args.window_layers is not None else args.model_type
    longest = {} if args.max_seq_len is None else {"max_position_embeddings": args.max_seq_len}
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": args.tie_word_embeddings,
        **longest,
        **rope,
        **_layers(args, kind),
        **_stated_biases(args),
    }


def _faults(args: ModelArgs) -> Iterator[str]:
    """What a family has not there."""
    own, attention, mlp = _BIASES[args.model_type]
    biases = set(args.biases or ())
    groups = [set(own)] if own else [set()]
    groups += [group | set(_ATTENTION) for group in groups] if attention else []
    groups += [group | set(_MLP) for group in groups] if mlp else []
    if biases not in groups:
        yield f"biases of {', '.join(sorted(biases)) or 'no linear'}"
    if bool(args.head_norms) != (args.model_type == "qwen3"):
        yield "norms of each head of queries and keys" if args.head_norms else "no norms of heads"
    if args.model_type == "llama" and args.sliding_window is not None:
        yield f"a sliding window of {args.sliding_window} tokens"
    if args.model_type != "smollm3" and args.unrotated_layers:
        yield "layers without rotary positions"


def _layers(args: ModelArgs, kind: str) -> dict[str, Any]:
    """The window and the layers that it bounds, and the layers without positions."""
    if kind == "llama":
        return {}
    if kind == "mistral":
        return {"sliding_window": args.sliding_window}
    kinds = [_FULL if args.window(layer) is None else _SLIDING for layer in range(args.n_layers)]
    found: dict[str, Any] = {"sliding_window": args.sliding_window, "layer_types": kinds}
    if kind == "ministral":
        return found
    first = kinds.index(_SLIDING) if _SLIDING in kinds else args.n_layers
    found |= {"use_sliding_window": args.sliding_window is not None, "max_window_layers": first}
    if kind == "smollm3":
        unrotated = args.unrotated_layers or ()
        found["no_rope_layers"] = [int(layer not in unrotated) for layer in range(args.n_layers)]
    return found


def _stated_biases(args: ModelArgs) -> dict[str, bool]:
    """Which linears have a bias, in a family that says so."""
    _, attention, mlp = _BIASES[args.model_type]
    held = args.biases or ()
    found = {"attention_bias": "wq" in held} if attention else {}
    return found | ({"mlp_bias": "w1" in held} if mlp else {})
