"""config.json as each family writes it for Hugging Face: what is read again, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import small_models

from mlxlora_core.errors import ModelError

REGISTRY = small_models.REGISTRY


def layout(family: str) -> Any:
    return REGISTRY.find("architecture", small_models.FAMILIES[family][0]).spec.layouts["hf"]


def shapes(args: Any) -> dict[str, tuple[int, ...]]:
    """Of the tensors that say something: whether there is a head."""
    head = {} if args.tie_word_embeddings else {"lm_head.weight": (args.vocab_size, args.dim)}
    return {"model.embed_tokens.weight": (args.vocab_size, args.dim), **head}


YARN = {
    "rope_scaling": "yarn",
    "rope_factor": 4.0,
    "rope_original_len": 64,
    "rope_beta_fast": 16.0,
    "rope_beta_slow": 2.0,
    "rope_attention_factor": 1.25,
}
LONGROPE = {
    "rope_original_len": 64,
    "rope_short_divisors": (1.0, 1.5, 2.0, 4.0),
    "rope_long_divisors": (1.0, 3.0, 9.0, 27.0),
    "rope_attention_factor": 1.1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in small_models.FAMILIES},
    "linear": ("llama", {"rope_scaling": "linear", "rope_factor": 2.5}),
    "yarn": ("qwen2", YARN),
    "yarn between pairs": ("qwen3", {**YARN, "rope_truncate": False}),
    "biases of a llama": ("llama", {"biases": ("wq", "wk", "wv", "wo", "w1", "w2", "w3")}),
    "biases of attention": ("qwen3", {"biases": ("wq", "wk", "wv", "wo")}),
    "no context": ("llama", {"max_seq_len": None}),
    "no window": ("mistral", {"sliding_window": None}),
    "windows of a ministral": ("mistral", {"window_layers": (1,)}),
    "windows of a qwen": ("qwen3", {"sliding_window": 8, "window_layers": (1,)}),
    "windows everywhere": ("qwen2", {"sliding_window": 8}),
    "all layers rotated": ("smollm3", {"unrotated_layers": None}),
    "gemma without a window": (
        "gemma3",
        {"sliding_window": None, "window_layers": None, "sliding_rope_theta": None},
    ),
    "gemma with a scaled rope": ("gemma3", {"rope_factor": 8.0}),
    "gemma, untied": ("gemma2", {"tie_word_embeddings": False, "rope_factor": 2.0}),
    "scores by a number that is not whole": ("gemma2", {"query_pre_attn_scalar": 14.5}),
    "longrope": ("phi3", LONGROPE),
    "a third of a head": ("phi3", {"head_dim": 48, "rotary_dim": 14}),
    "all of a head": ("phi3", {"rotary_dim": None}),
    "biases of an olmo": ("olmo2", {"attention_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_as_the_same(case: str) -> None:
    family, changed = CASES[case]
    args = replace(small_models.args_of(family), **changed)
    config = layout(family).write(args)
    assert layout(family).read(config, shapes(args)) == args
    assert config["architectures"][0].endswith("ForCausalLM")
    for key in ("head_dim", "tie_word_embeddings", "rope_theta", "rope_parameters"):
        assert key in config


def test_the_scaling_of_llama_3_is_found_in_its_divisors() -> None:
    """As llama.cpp's file has them, in float32: the frequencies that transformers computes."""
    base = replace(small_models.args_of("llama"), rope_theta=5e5, head_dim=128)
    for factor in (8.0, 32.0):
        divisors = []
        for pair in range(64):
            angle = 5e5 ** (-2 * pair / 128)
            length = 2 * 3.141592653589793 / angle
            share = min(max((8192 / length - 1.0) / (4.0 - 1.0), 0.0), 1.0)
            divisors.append(float(f"{1 / ((1 - share) / factor + share):.7g}"))
        args = replace(base, rope_scaling="divisors", rope_divisors=tuple(divisors))
        config = layout("llama").write(args)
        want = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        assert config["rope_scaling"] == {**want, "original_max_position_embeddings": 8192}
    even = replace(base, rope_scaling="divisors", rope_divisors=(4.0,) * 64)
    assert layout("llama").write(even)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    divisors[40] *= 1.001
    with pytest.raises(ModelError, match="divided by numbers of the model's own"):
        layout("llama").write(replace(args, rope_divisors=tuple(divisors)))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window": ("llama", {"sliding_window": 8}, "no llama that is such: a sliding window of 8 tokens"),
    "biases": ("mistral", {"biases": ("wq",)}, "biases of wq"),
    "no biases": ("qwen2", {"biases": None}, "biases of no linear"),
    "norms": ("llama", {"head_norms": True}, "norms of each head"),
    "no norms": ("qwen3", {"head_norms": None}, "no norms of heads"),
    "no positions": ("qwen2", {"unrotated_layers": (0,)}, "layers without rotary positions"),
    "a cap": ("gemma3", {"attn_logit_softcapping": 50.0}, "stay below a cap"),
    "bases": ("gemma2", {"sliding_rope_theta": 1e3}, "of its own for layers with a window"),
    "no base": ("gemma3", {"sliding_rope_theta": None}, "no base of rotary wavelengths of their own"),
    "no context": ("gemma2", {"max_seq_len": None}, "no longest sequence"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_hugging_face_has_no_word_for_is_refused_in_one_line(case: str) -> None:
    family, changed, words = REFUSED[case]
    with pytest.raises(ModelError, match=words) as caught:
        layout(family).write(replace(small_models.args_of(family), **changed))
    assert "\n" not in str(caught.value)
