"""What the llama architecture makes of a config.json of Hugging Face: read, assumed, refused."""

from __future__ import annotations

from typing import Any

import pytest
from mlxlora_llama import hf, hf_rope
from mlxlora_llama.config import ModelArgs

from mlxlora_core.errors import ExitCode, ModelError

# As published, but for the lists of tokens.
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
PUBLISHED = {
    "Llama 3.2 1B": LLAMA_32_1B,
    "SmolLM2 135M": SMOLLM2_135M,
    "Qwen2.5 0.5B": QWEN25_05B,
    "Qwen3 0.6B": QWEN3_06B,
    "Mistral 7B v0.1": MISTRAL_V01,
    "SmolLM3 3B": SMOLLM3_3B,
}
HEAD = {"lm_head.weight": (32000, 4096)}


def config(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> ModelArgs:
    args = hf.read(raw, shapes or {})
    assert args is not None
    return args


def faults(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        hf.read(raw, shapes or {})
    assert caught.value.exit_code == ExitCode.MODEL
    assert len(str(caught.value)) < 2000 and str(caught.value).isprintable()
    return caught.value.what


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    raw = PUBLISHED[name]
    args = config(raw, {} if raw.get("tie_word_embeddings", True) else HEAD)
    assert (args.model_type, args.dim, args.n_layers) == (
        raw["model_type"],
        raw["hidden_size"],
        raw["num_hidden_layers"],
    )
    assert (args.n_heads, args.n_kv_heads) == (raw["num_attention_heads"], raw["num_key_value_heads"])
    assert (args.rope_theta, args.max_seq_len) == (raw["rope_theta"], raw["max_position_embeddings"])
    assert hf.notes(raw, {} if raw.get("tie_word_embeddings", True) else HEAD) == []


def test_what_sets_the_families_apart() -> None:
    llama = config(LLAMA_32_1B)
    assert (llama.rope_scaling, llama.rope_factor, llama.rope_original_len) == ("llama3", 32.0, 8192)
    assert (llama.tie_word_embeddings, llama.head_norms, llama.biases) == (True, None, None)
    qwen2 = config(QWEN25_05B)
    assert (qwen2.biases, qwen2.sliding_window, qwen2.head_dim) == (("wq", "wk", "wv"), None, 64)
    qwen3 = config(QWEN3_06B)
    assert (qwen3.head_norms, qwen3.head_dim, qwen3.biases) == (True, 128, None)
    mistral = config(MISTRAL_V01, HEAD)
    assert (mistral.sliding_window, mistral.window_layers) == (4096, None)
    assert config(SMOLLM3_3B).unrotated_layers == tuple(range(3, 36, 4))


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_of_the_rope_are_the_same(name: str) -> None:
    raw = PUBLISHED[name]
    rope = {"rope_type": "default", **(raw.get("rope_scaling") or {}), "rope_theta": raw["rope_theta"]}
    new = {**without(raw, "rope_theta", "rope_scaling"), "rope_parameters": rope}
    assert config(new) == config(raw) == config({**raw, "rope_parameters": rope})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3"}},
        {"rope_parameters": {**LLAMA_32_1B["rope_scaling"], "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"original_max_position_embeddings": 4096},
    ],
)
def test_spellings_that_differ_are_refused(change: dict[str, Any]) -> None:
    assert "got both " in faults(LLAMA_32_1B | change)


@pytest.mark.parametrize("gone", [("rope_theta",), ("rope_theta", "rope_scaling")])
def test_a_base_that_nobody_states_is_that_of_the_first_llama_and_no_other_s(gone: tuple[str, ...]) -> None:
    raw = without(SMOLLM2_135M, *gone)
    assert config(raw).rope_theta == 1e4
    assert hf.notes(raw, {})[0].startswith("config.json states no rope_theta: 10000.0 is taken")
    for other in (QWEN3_06B, SMOLLM3_3B):
        assert "rope_theta is required: base of the rotary wavelengths" in faults(without(other, *gone))


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({"type": "linear", "factor": 2.0}, {"rope_scaling": "linear", "rope_factor": 2.0}),
        ({"rope_type": "default"}, {"rope_scaling": None}),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            {"rope_beta_fast": 32.0, "rope_beta_slow": 1.0, "rope_attention_factor": 1.1386294361119891},
        ),
        ({"type": "yarn", "factor": 4.0}, {"rope_original_len": 32768}),
        ({"type": "yarn", "original_max_position_embeddings": 8192}, {"rope_factor": 4.0}),
        ({"type": "yarn", "factor": 0.5}, {"rope_attention_factor": 1.0}),
        (
            {"type": "yarn", "factor": 4.0, "attention_factor": 1.5, "mscale": 2.0},
            {"rope_attention_factor": 1.5},
        ),
        (
            {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False},
            {"rope_attention_factor": 1.0, "rope_truncate": False},
        ),
        ({"type": "yarn", "factor": 4.0, "finetuned": True, "mscale": None}, {"rope_scaling": "yarn"}),
        ({"type": "dynamic", "factor": 4.0}, {"rope_scaling": None, "max_seq_len": 32768}),
    ],
)
def test_scalings(change: dict[str, Any], scaling: dict[str, Any]) -> None:
    args = config({**QWEN25_05B, "rope_scaling": change})
    assert {name: getattr(args, name) for name in scaling} == pytest.approx(scaling, nan_ok=False)


def test_a_dynamic_scaling_is_told() -> None:
    raw = {**QWEN25_05B, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    assert "dynamic) beyond max_position_embeddings 32768, where the model ends here" in hf_rope.notes(raw)[0]
    assert "max_position_embeddings is required" in faults(without(raw, "max_position_embeddings"))


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        ({"type": "su"}, "rope_type: got 'su', but only default, linear, llama3 and yarn are built here"),
        ({"rope_type": "longrope", "factor": 4.0}, "rope_type: got 'longrope'"),
        ({"rope_type": ["yarn"]}, "rope_type: got ['yarn']"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_low_freq_factor: rope_scaling llama3 needs it"),
        ({"type": "linear"}, "rope_factor: rope_scaling linear needs it"),
        ({"type": "linear", "factor": 0}, "factor: must be at least 0.001"),
        ({"type": "linear", "factor": "2"}, "factor: wanted number"),
        (
            {"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2},
            "rope_beta_fast: wanted more than 2.0",
        ),
        ({"type": "yarn", "factor": 4.0, "mrope_section": [16, 24]}, "unknown: mrope_section [16, 24]"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, wanted 1"),
        ("yarn", "rope_scaling: got 'yarn', wanted one table for all layers"),
        ({"full_attention": {"rope_type": "default"}}, "wanted one table for all layers"),
        ({"original_max_position_embeddings": "x", "type": "yarn", "factor": 2.0}, "wanted integer"),
    ],
)
def test_scalings_that_are_not_built_are_refused(rope: Any, told: str) -> None:
    assert told in faults({**QWEN25_05B, "rope_scaling": rope})


def test_what_the_tensors_tell_is_read_off_them() -> None:
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (2048, 1024),
        "model.layers.0.self_attn.k_proj.weight": (1024, 1024),
    }
    raw = {**without(QWEN3_06B, "num_key_value_heads"), "head_dim": None}
    assert config(raw, shapes) == config(QWEN3_06B)
    short = config(raw)
    assert (short.head_dim, short.n_kv_heads) == (64, 16)


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("there", [True, False])
def test_a_head_that_is_there_is_used(stated: bool | None, there: bool) -> None:
    raw = {**LLAMA_32_1B, "tie_word_embeddings": stated}
    shapes = {"lm_head.weight": (128256, 2048)} if there else {}
    assert config(raw, shapes).tie_word_embeddings is (not there and stated is not False)
    told = hf.notes(raw, shapes)
    assert (stated is True and there) == bool(told)


@pytest.mark.parametrize(
    ("raw", "window", "layers"),
    [
        ({**MISTRAL_V01, "sliding_window": None}, None, None),
        ({**MISTRAL_V01, "use_sliding_window": False}, None, None),
        (without(MISTRAL_V01, "sliding_window"), 4096, None),
        ({**MISTRAL_V01, "layer_types": ["full_attention"] * 32}, None, None),
        ({**MISTRAL_V01, "layer_types": ["sliding_attention", "full_attention"] * 16}, 4096, range(0, 32, 2)),
        ({**MISTRAL_V01, "model_type": "ministral"}, 4096, None),
        ({**QWEN25_05B, "use_sliding_window": True}, 32768, range(21, 24)),
        ({**without(QWEN25_05B, "max_window_layers"), "use_sliding_window": True}, None, None),
        ({**QWEN25_05B, "use_sliding_window": True, "max_window_layers": 0}, 32768, None),
        ({**QWEN25_05B, "use_sliding_window": True, "max_window_layers": 24}, None, None),
        ({**QWEN25_05B, "use_sliding_window": True, "sliding_window": None}, None, None),
        ({**QWEN25_05B, "use_sliding_window": None}, None, None),
        (
            {**without(SMOLLM3_3B, "layer_types"), "use_sliding_window": True, "sliding_window": 9},
            9,
            range(3, 36, 4),
        ),
        (
            {
                **SMOLLM3_3B,
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention"] * 36,
            },
            9,
            None,
        ),
    ],
)
def test_windows(raw: dict[str, Any], window: int | None, layers: range | None) -> None:
    args = config(raw)
    assert (args.sliding_window, args.window_layers) == (window, None if layers is None else tuple(layers))


def test_a_window_that_mistral_does_not_state_is_told() -> None:
    raw = without(MISTRAL_V01, "sliding_window")
    assert hf.notes(raw, HEAD) == [
        "config.json states no sliding_window: 4096 is taken, as transformers has it"
    ]


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({"no_rope_layers": [0] * 18 + [1] * 20}, tuple(range(18))),
        ({"no_rope_layers": [1] * 36}, None),
        ({"no_rope_layers": None}, tuple(range(3, 36, 4))),
        ({"no_rope_layers": None, "no_rope_layer_interval": 12}, (11, 23, 35)),
        ({"no_rope_layers": None, "no_rope_layer_interval": None}, tuple(range(3, 36, 4))),
    ],
)
def test_layers_without_positions(change: dict[str, Any], layers: tuple[int, ...] | None) -> None:
    assert config(SMOLLM3_3B | change).unrotated_layers == layers


@pytest.mark.parametrize(
    ("raw", "biases"),
    [
        ({**LLAMA_32_1B, "attention_bias": True}, ("wq", "wk", "wv", "wo")),
        ({**LLAMA_32_1B, "mlp_bias": True}, ("w1", "w2", "w3")),
        ({**QWEN3_06B, "attention_bias": True}, ("wq", "wk", "wv", "wo")),
        ({**QWEN25_05B, "attention_bias": True}, ("wq", "wk", "wv")),
        ({**QWEN25_05B, "attention_bias": False}, ("wq", "wk", "wv")),
    ],
)
def test_biases(raw: dict[str, Any], biases: tuple[str, ...]) -> None:
    assert config(raw).biases == biases


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gemma3_text", "phi3", None, 7, ["llama"]])
def test_the_config_of_another_family_is_nobody_s(model_type: Any) -> None:
    assert hf.read({**LLAMA_32_1B, "model_type": model_type}, {}) is None
    assert hf.read({}, {}) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"hidden_act": "gelu"},
            "hidden_act: got 'gelu', but only 'silu', 'swish', 'swiglu' is built here",
        ),
        ({"rope_interleaved": True}, "rope_interleaved: got True, but only False is built here"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, but only 1 is built here"),
        ({"num_local_experts": 8}, "num_local_experts: got 8, which asks for a mixture of experts"),
        ({"sliding_window": 4096}, "sliding_window: got 4096, which asks for a window"),
        ({"layer_types": ["full_attention"]}, "layer_types: got"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: got 50.0"),
        ({"use_qk_norm": True}, "use_qk_norm: got True, which asks for other norms"),
        ({"quantization_config": {"bits": 4}}, "which asks for a checkpoint that is quantized already"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "unknown: dual_chunk_attention_config"),
        ({"rms_norm_epss": 1e-5}, "unknown: rms_norm_epss 1e-05 (did you mean 'rms_norm_eps'?)"),
        ({"attention_bias": "yes"}, "attention_bias: got 'yes', wanted true or false"),
        ({"hidden_size": "2048"}, "hidden_size: wanted integer, got '2048'"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: must be at least 1 and at most 1024"),
        ({"num_key_value_heads": 5}, "n_kv_heads: got 5, wanted a divisor of n_heads 32"),
        ({"head_dim": 63}, "head_dim: got 63, wanted an even number"),
        ({"rms_norm_eps": None}, "rms_norm_eps is required"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: wanted true/false, got 'no'"),
    ],
)
def test_what_would_change_the_numbers_is_refused(change: dict[str, Any], told: str) -> None:
    assert told in faults(LLAMA_32_1B | change)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({**QWEN25_05B, "max_window_layers": "21"}, "max_window_layers: got '21', wanted a whole number"),
        ({**QWEN25_05B, "use_sliding_window": "yes"}, "use_sliding_window: got 'yes', wanted true or false"),
        ({**QWEN25_05B, "layer_types": ["full_attention"]}, "layer_types: got"),
        (
            {**QWEN25_05B, "layer_types": ["linear_attention"] * 24},
            "layer_types: got linear_attention, but only",
        ),
        (
            {**QWEN25_05B, "layer_types": ["sliding_attention"] * 24},
            "but there is no sliding_window that is used",
        ),
        (
            {**SMOLLM3_3B, "no_rope_layers": [1, 0]},
            "no_rope_layers: got [1, 0], wanted a 0 or 1 for each of 36",
        ),
        ({**SMOLLM3_3B, "no_rope_layers": [2] * 36}, "no_rope_layers: got"),
        (
            {**SMOLLM3_3B, "no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval: got 0, wanted a whole number of at least 1",
        ),
    ],
)
def test_layers_that_make_no_sense_are_refused(raw: dict[str, Any], told: str) -> None:
    assert told in faults(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"id2label": {"0": "LABEL_0"}, "problem_type": None, "torchscript": False, "top_k": 50},
        {"is_decoder": False, "is_encoder_decoder": False, "chunk_size_feed_forward": 0},
        {"_attn_implementation_autoset": True, "unsloth_version": "2025.1.1", "_name_or_path": "x"},
        {"whatever": None, "sliding_window": None, "num_experts": 0, "moe": {}},
        {"dtype": "bfloat16", "layer_norm_eps": 1e-5},
    ],
)
def test_what_has_no_effect_passes(change: dict[str, Any]) -> None:
    assert config(LLAMA_32_1B | change) == config(LLAMA_32_1B)


def test_all_faults_are_told_in_one_line() -> None:
    told = faults(
        {**QWEN25_05B, "hidden_size": -1, "swish": 2, "rope_scaling": {"type": "su"}, "max_window_layers": -1}
    )
    for part in ("hidden_size: ", "unknown: swish 2", "rope_type: got 'su'", "max_window_layers: got -1"):
        assert part in told


def test_no_config_crashes_or_fills_the_screen() -> None:
    """Each key of each published config in turn is something absurd."""
    absurd = (
        None,
        -1,
        0,
        1e400,
        "x" * 5000,
        [],
        [None],
        {},
        {"a": {}},
        True,
        10**30,
        "\n\x1b[2J",
        [[1] * 3000],
    )
    for raw in PUBLISHED.values():
        for key in raw:
            for value in absurd:
                try:
                    hf.read({**raw, key: value}, {})
                    hf_rope.notes({**raw, key: value})
                except ModelError as fault:
                    assert str(fault).isprintable() and len(str(fault)) < 2000
    rope = LLAMA_32_1B["rope_scaling"]
    for key in (*rope, "beta_fast", "mscale", "mscale_all_dim", "truncate", "type", "rope_theta"):
        for kind in ("yarn", "llama3", "linear", "dynamic"):
            for value in absurd:
                try:
                    hf.read({**LLAMA_32_1B, "rope_scaling": {**rope, "rope_type": kind, key: value}}, {})
                except ModelError as fault:
                    assert str(fault).isprintable() and len(str(fault)) < 2000
