"""What the llama architecture makes of the metadata of a GGUF file: read, assumed, refused."""

from __future__ import annotations

from typing import Any

import pytest
from mlxlora_llama import gguf
from mlxlora_llama.config import ModelArgs

from mlxlora_core.errors import ExitCode, ModelError

# The keys of SmolLM2-135M-Instruct's file, those of the tokenizer left out.
SMOLLM2 = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.name": "Smollm2 135M 8k Lc100K Mix1 Ep2",
    "general.file_type": 3,
    "general.quantization_version": 2,
    "general.languages": ["en"],
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 64,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49152,
}
SHAPES = {"token_embd.weight": (49152, 576), "output_norm.weight": (576,)}


def of(architecture: str, **keys: Any) -> dict[str, Any]:
    """The same model as one of another architecture, with further keys in place of dots __."""
    raw = {key.replace("llama.", f"{architecture}."): value for key, value in SMOLLM2.items()}
    more = {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    return {**raw, **more, "general.architecture": architecture}


def config(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> ModelArgs:
    args = gguf.read(raw, shapes or SHAPES)
    assert args is not None
    return args


def faults(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        gguf.read(raw, shapes or SHAPES)
    assert caught.value.exit_code == ExitCode.MODEL
    assert len(str(caught.value)) < 2000 and str(caught.value).isprintable()
    return caught.value.what


def test_smollm2_is_read() -> None:
    assert config(SMOLLM2) == ModelArgs(
        model_type="llama",
        dim=576,
        n_layers=30,
        head_dim=64,
        hidden_dim=1536,
        n_heads=9,
        n_kv_heads=3,
        norm_eps=9.999999747378752e-06,
        vocab_size=49152,
        rope_theta=100000.0,
        max_seq_len=8192,
        tie_word_embeddings=True,
    )
    assert gguf.notes(SMOLLM2, SHAPES) == []


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("llama", "llama"),
        ("mistral3", "mistral"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("smollm3", "smollm3"),
    ],
)
def test_the_families(architecture: str, model_type: str) -> None:
    args = config(of(architecture))
    assert args.model_type == model_type
    assert args.head_norms is (True if architecture == "qwen3" else None)
    unrotated = tuple(range(3, 30, 4)) if architecture == "smollm3" else None
    assert args.unrotated_layers == unrotated


@pytest.mark.parametrize("architecture", ["gemma3", "llama4", "qwen3moe", "clip", None, 7, ["llama"]])
def test_another_family_is_nobody_s(architecture: Any) -> None:
    assert gguf.read({**SMOLLM2, "general.architecture": architecture}, SHAPES) is None
    assert gguf.read({}, SHAPES) is None


def test_what_the_tensors_tell_is_read_off_them() -> None:
    shapes = {
        **SHAPES,
        "token_embd.weight": (49280, 576),
        "output.weight": (49280, 576),
        "blk.0.attn_q.bias": (576,),
        "blk.0.ffn_down.bias": (576,),
    }
    args = config(SMOLLM2, shapes)
    assert (args.vocab_size, args.tie_word_embeddings, args.biases) == (49280, False, ("wq", "w2"))
    bare = {key: value for key, value in SMOLLM2.items() if "vocab_size" not in key and "_kv" not in key}
    assert (config(bare).vocab_size, config(bare).n_kv_heads) == (49152, 9)


def test_the_width_of_a_head_may_be_its_own() -> None:
    keys = {"attention__key_length": 128, "attention__value_length": 128, "rope__dimension_count": 128}
    assert config(of("qwen3", **keys)).head_dim == 128


def test_a_base_that_is_not_stated_is_told() -> None:
    raw = {key: value for key, value in SMOLLM2.items() if "freq_base" not in key}
    assert config(raw).rope_theta == 10000.0
    assert gguf.notes(raw, SHAPES) == [
        "the file states no rope.freq_base: 10000.0 is taken, as llama.cpp has it"
    ]


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, {"rope_scaling": None}),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            {"rope_scaling": "linear", "rope_factor": 4.0},
        ),
        ({"rope__scale_linear": 2.0}, {"rope_scaling": "linear", "rope_factor": 2.0}),
        ({"rope__scale_linear": 1.0}, {"rope_scaling": None}),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 2048,
                "rope__scaling__finetuned": True,
            },
            {
                "rope_scaling": "yarn",
                "rope_original_len": 2048,
                "rope_beta_fast": 32.0,
                "rope_beta_slow": 1.0,
                "rope_attention_factor": 1.1386294361119891,
            },
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__yarn_beta_fast": 8.0,
                "rope__scaling__yarn_log_multiplier": 1.0,
                "rope__scaling__attn_factor": 1.5,
            },
            {"rope_original_len": 8192, "rope_beta_fast": 8.0, "rope_attention_factor": 1.5},
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__yarn_attn_factor": 1.25,
            },
            {"rope_attention_factor": 1.25},
        ),
    ],
)
def test_scalings(keys: dict[str, Any], scaling: dict[str, Any]) -> None:
    args = config(of("llama", **keys))
    assert {name: getattr(args, name) for name in scaling} == pytest.approx(scaling)


def test_the_divisors_of_llama_3_1_are_read() -> None:
    """A file of Llama 3.1 says nothing of its scaling but by this tensor."""
    divisors = [1.0] * 20 + [8.0] * 12
    args = config({**SMOLLM2, "rope_freqs.weight": divisors})
    assert (args.rope_scaling, args.rope_divisors) == ("divisors", tuple(divisors))
    assert "rope_divisors: got 3, wanted head_dim / 2" in faults({**SMOLLM2, "rope_freqs.weight": [1.0] * 3})
    both = of("llama", rope__scaling__type="linear", rope__scaling__factor=4.0)
    told = faults({**both, "rope_freqs.weight": divisors})
    assert "llama.rope.scaling.type: got 'linear', but there is a rope_freqs.weight too" in told


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"expert_count": 8}, "expert_count: got 8, but only 0 is built here"),
        ({"attention__temperature_scale": 0.1}, "attention.temperature_scale: got 0.1, but only 0 is built"),
        ({"attention__causal": False}, "attention.causal: got False"),
        ({"attention__sliding_window": 4096}, "attention.sliding_window: got 4096, which asks for a window"),
        ({"attention__value_length": 32}, "attention.value_length: got 32, wanted the width of a head, 64"),
        ({"rope__dimension_count": 32}, "rope.dimension_count: got 32, wanted the width of a head, 64"),
        (
            {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0},
            "rope.scaling.type: must be one of",
        ),
        (
            {"rope__scaling__attn_factor": 2.0},
            "rope.scaling.attn_factor: got 2.0, which only a yarn has here",
        ),
        ({"rope__scaling__factor": -1.0}, "rope.scaling.factor: must be at least 0.001"),
        ({"logit_scale": 0.5}, "logit_scale: got 0.5"),
        ({"whatever": 1}, "unknown: llama.whatever 1"),
        ({"block_count": 10**9}, "block_count: must be at least 1 and at most 1024"),
        ({"attention__head_count_kv": [3] * 30}, "attention.head_count_kv: wanted a whole number"),
        ({"attention__layer_norm_rms_epsilon": None}, "attention.layer_norm_rms_epsilon is required"),
    ],
)
def test_what_would_change_the_numbers_is_refused(keys: dict[str, Any], told: str) -> None:
    assert told in faults(of("llama", **keys))


def test_no_metadata_crashes_or_fills_the_screen() -> None:
    absurd = (None, -1, 0, 1e400, "x" * 5000, [], [None], {}, True, 10**30, "\n\x1b[2J", [[1] * 3000])
    names = {key.removeprefix("llama.") for key in SMOLLM2} | set(gguf._HONOURED)
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    for name in names:
        for value in absurd:
            for raw in (SMOLLM2, SMOLLM2 | yarn):
                key = name if name in raw or name == "rope_freqs.weight" else f"llama.{name}"
                try:
                    gguf.read({**raw, key: value}, SHAPES)
                except ModelError as fault:
                    assert str(fault).isprintable() and len(str(fault)) < 2000
