"""What the gemma architecture makes of config.json and of the keys of a GGUF file: read, assumed, refused."""

from __future__ import annotations

from typing import Any

import pytest
from mlxlora_gemma import gguf, hf, tables
from mlxlora_gemma.config import ModelArgs

from mlxlora_core.errors import ExitCode, ModelError

# As Google has it in gemma-2-2b.
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
# The text model in gemma-3-4b-it: all else is what transformers takes.
GEMMA3 = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
SHAPES = {
    "model.embed_tokens.weight": (262208, 2560),
    "model.layers.0.self_attn.q_proj.weight": (2048, 2560),
    "model.layers.0.self_attn.k_proj.weight": (1024, 2560),
    "model.layers.0.self_attn.q_norm.weight": (256,),
}
# The keys of gemma-3-270m, those of the tokenizer left out.
GGUF = {
    "general.architecture": "gemma3",
    "general.name": "Gemma 3 270m",
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.block_count": 18,
    "gemma3.feed_forward_length": 2048,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.rope.freq_base": 1000000.0,
    "gemma3.attention.sliding_window": 512,
    "gemma3.attention.head_count_kv": 1,
    "general.quantization_version": 2,
}
GGUF_SHAPES = {"token_embd.weight": (262144, 640)}


def config(raw: dict[str, Any], layout: Any = hf, shapes: Any = None) -> ModelArgs:
    args = layout.read(raw, shapes or {})
    assert isinstance(args, ModelArgs)
    return args


def faults(raw: dict[str, Any], layout: Any = hf, shapes: Any = None) -> str:
    with pytest.raises(ModelError) as caught:
        layout.read(raw, shapes or {})
    assert caught.value.exit_code == ExitCode.MODEL
    assert len(str(caught.value)) < 2000 and str(caught.value).isprintable()
    return caught.value.what


def test_gemma_2_is_read() -> None:
    args = config(GEMMA2)
    assert args == ModelArgs(
        model_type="gemma2",
        dim=2304,
        n_layers=26,
        head_dim=256,
        hidden_dim=9216,
        n_heads=8,
        n_kv_heads=4,
        norm_eps=1e-6,
        vocab_size=256000,
        query_pre_attn_scalar=256,
        rope_theta=10000.0,
        sliding_window=4096,
        window_layers=tuple(range(0, 26, 2)),
        max_seq_len=8192,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )
    assert list(hf.notes(GEMMA2, {})) == []
    assert [args.window(layer) for layer in range(3)] == [4096, None, 4096]
    assert args.turning(0) == args.turning(1) == 10000.0


def test_what_gemma_3_leaves_out_is_that_of_transformers_and_told() -> None:
    args = config(GEMMA3, shapes=SHAPES)
    assert args == ModelArgs(
        model_type="gemma3_text",
        dim=2560,
        n_layers=34,
        head_dim=256,
        hidden_dim=10240,
        n_heads=8,
        n_kv_heads=4,
        norm_eps=1e-6,
        vocab_size=262208,
        query_pre_attn_scalar=256,
        rope_theta=1e6,
        rope_factor=8.0,
        sliding_rope_theta=1e4,
        sliding_window=1024,
        window_layers=tuple(layer for layer in range(34) if layer % 6 != 5),
        max_seq_len=131072,
        head_norms=True,
    )
    (note,) = hf.notes(GEMMA3, SHAPES)
    for said in ("rms_norm_eps 1e-06", "rope_theta 1000000.0", "rope_local_base_freq 10000.0"):
        assert said in note
    assert args.turning(0) == 1e4
    angles = args.turning(5)
    assert isinstance(angles, tuple) and angles[:1] == (1 / 8,) and len(angles) == 128


def test_both_spellings_are_one() -> None:
    tables = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    new = {key: value for key, value in GEMMA3.items() if key != "rope_scaling"} | {"rope_parameters": tables}
    assert config(new, shapes=SHAPES) == config(GEMMA3, shapes=SHAPES)
    assert config({**GEMMA3, "rope_parameters": tables}, shapes=SHAPES) == config(GEMMA3, shapes=SHAPES)
    assert "rope_theta: got both" in faults({**new, "rope_theta": 10000.0}, shapes=SHAPES)
    assert "rope_theta: got both" in faults({**new, "rope_local_base_freq": 20.0}, shapes=SHAPES)


def test_a_pattern_of_one_has_no_window() -> None:
    args = config({**GEMMA3, "sliding_window_pattern": 1}, shapes=SHAPES)
    assert (args.sliding_window, args.window_layers, args.sliding_rope_theta) == (None, None, None)


def test_a_head_that_is_there_is_used() -> None:
    shapes = {**SHAPES, "lm_head.weight": (262208, 2560)}
    raw = {**GEMMA3, "tie_word_embeddings": True}
    assert not config(raw, shapes=shapes).tie_word_embeddings
    assert "there is a lm_head.weight" in hf.notes(raw, shapes)[-1]
    assert config(GEMMA3, shapes=SHAPES).tie_word_embeddings
    assert tables.hf(config(raw, shapes=shapes))[-1].foreign == "lm_head.weight"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation: got 'silu'"),
        ({"attention_bias": True}, "attention_bias: got True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: got True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: got 50.0"),
        ({"sliding_window": None}, "sliding_window: got none"),
        ({"layer_types": ["full_attention"]}, "layer_types: got"),
        ({"layer_types": ["chunked_attention"] * 34}, "only full_attention and sliding_attention"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern: got 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type: got 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is required"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters: got"),
        ({"head_dim": 7, "num_attention_heads": 8, "num_key_value_heads": 4}, "head_dim: got 7"),
        ({"n_experts_of_mine": 4}, "mixture of experts"),
        ({"altup_num_inputs": 4}, "unknown: altup_num_inputs"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_is_not_built_is_refused(changes: dict[str, Any], told: str) -> None:
    assert told in faults({**GEMMA3, **changes}, shapes=SHAPES)


def test_layers_with_a_window_that_are_scaled_are_refused() -> None:
    table = {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    raw = {key: value for key, value in GEMMA3.items() if key != "rope_scaling"}
    assert "sliding_attention that are scaled" in faults({**raw, "rope_parameters": table}, shapes=SHAPES)


@pytest.mark.parametrize("model_type", ["gemma", "gemma3", "gemma3n_text", "llama", None, 7, ["gemma2"]])
def test_others_are_left_to_others(model_type: Any) -> None:
    assert hf.read({**GEMMA2, "model_type": model_type}, {}) is None


# --- GGUF ---------------------------------------------------------------------


def test_the_file_of_gemma_3_is_read() -> None:
    assert config(GGUF, gguf, GGUF_SHAPES) == ModelArgs(
        model_type="gemma3_text",
        dim=640,
        n_layers=18,
        head_dim=256,
        hidden_dim=2048,
        n_heads=4,
        n_kv_heads=1,
        norm_eps=1e-6,
        vocab_size=262144,
        query_pre_attn_scalar=256,
        rope_theta=1e6,
        sliding_rope_theta=1e4,
        sliding_window=512,
        window_layers=tuple(layer for layer in range(18) if layer % 6 != 5),
        max_seq_len=32768,
        head_norms=True,
    )
    assert gguf.notes(GGUF, GGUF_SHAPES) == []
    unstated = {key: value for key, value in GGUF.items() if key != "gemma3.rope.freq_base"}
    assert "10000.0 is taken" in gguf.notes(unstated, GGUF_SHAPES)[0]


def of(architecture: str, **keys: Any) -> dict[str, Any]:
    """The same file as one of another architecture, with further keys in place of dots __."""
    raw = {key.replace("gemma3.", f"{architecture}."): value for key, value in GGUF.items()}
    more = {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    return {**raw, **more, "general.architecture": architecture}


def test_the_scale_of_the_largest_is_that_of_their_width() -> None:
    """Which no key states: llama.cpp knows them by their layers."""
    large = of("gemma3", block_count=62, embedding_length=5376, attention__head_count=32)
    assert config(large, gguf, GGUF_SHAPES).query_pre_attn_scalar == 168
    large = of("gemma2", block_count=46, embedding_length=4608, attention__head_count=32)
    assert config(large, gguf, GGUF_SHAPES).query_pre_attn_scalar == 144


def test_what_gemma_2_leaves_out_is_that_of_llama_cpp() -> None:
    raw = of("gemma2")
    del raw["gemma2.attention.sliding_window"], raw["gemma2.rope.freq_base"]
    args = config(raw, gguf, GGUF_SHAPES)
    assert (args.sliding_window, args.window_layers) == (4096, tuple(range(0, 18, 2)))
    assert (args.attn_logit_softcapping, args.final_logit_softcapping) == (50.0, 30.0)
    assert (args.rope_theta, args.sliding_rope_theta, args.head_norms) == (1e4, None, None)
    assert gguf.notes(raw, GGUF_SHAPES) == []


def test_marks_say_which_layers_have_a_window() -> None:
    args = config(
        of("gemma3", attention__sliding_window_pattern=[True] * 3 + [False] * 15), gguf, GGUF_SHAPES
    )
    assert args.window_layers == (0, 1, 2)
    none = config(of("gemma3", attention__sliding_window=0), gguf, GGUF_SHAPES)
    assert (none.sliding_window, none.window_layers, none.sliding_rope_theta) == (None, None, None)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"attention__value_length": 128}, "gemma3.attention.value_length: got 128"),
        ({"rope__dimension_count": 64}, "gemma3.rope.dimension_count: got 64"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0},
            "gemma3.rope.scaling.type: got 'yarn'",
        ),
        ({"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping: got 50.0"),
        ({"attention__sliding_window_pattern": [True]}, "gemma3.attention.sliding_window_pattern: got"),
        ({"expert_count": 8}, "gemma3.expert_count: got 8"),
        ({"something": 1}, "unknown: gemma3.something"),
        ({"attention__head_count": 0}, "gemma3.attention.head_count"),
    ],
)
def test_keys_of_a_file_that_are_not_built_are_refused(keys: dict[str, Any], told: str) -> None:
    assert told in faults(of("gemma3", **keys), gguf, GGUF_SHAPES)


def test_divisors_of_frequencies_are_refused() -> None:
    assert "rope_freqs.weight" in faults({**GGUF, "rope_freqs.weight": [1.0]}, gguf, GGUF_SHAPES)


def test_norms_there_have_the_one_added() -> None:
    shifts = {entry.name: entry.shift for entry in tables.gguf(config(GGUF, gguf, GGUF_SHAPES))}
    norms = {name for name in shifts if name.endswith("norm.weight")}
    assert {name for name, shift in shifts.items() if shift} == norms and len(norms) == 18 * 6 + 1
    assert set(shifts.values()) == {0.0, -1.0}
