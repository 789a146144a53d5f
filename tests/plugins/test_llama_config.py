"""What the llama architecture makes of a config: derived, checked, refused."""

from __future__ import annotations

import json
import math
from typing import Any

import llama_torch
import pytest
from mlxlora_llama import mlxlora_architectures, tensors
from mlxlora_llama.config import ModelArgs
from mlxlora_llama.params import notes, read

from mlxlora_core.errors import ExitCode, ModelError
from mlxlora_core.model.architectures import folder_args
from mlxlora_core.options import plain

# params.json as it was released, and the shapes of the tensors beside it.
LLAMA_2_7B = {
    "dim": 4096,
    "multiple_of": 256,
    "n_heads": 32,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
MISTRAL_7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
WHOLE = {**MISTRAL_7B, "model_type": "mistral"}
(SPEC,) = mlxlora_architectures()


def config(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ModelArgs:
    args = read(raw, shapes)
    assert args is not None
    return args


def shapes_of(hidden: int, vocab: int, tied: bool = False) -> dict[str, tuple[int, ...]]:
    small = {"dim": 4096, "hidden_dim": hidden, "vocab_size": vocab, "n_layers": 1}
    return llama_torch.shapes({**small, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128}, tied=tied)


def faults(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        read(raw, shapes or {})
    assert caught.value.exit_code == ExitCode.MODEL
    return caught.value.what


def test_llama_2_is_derived_from_its_tensors() -> None:
    assert config(LLAMA_2_7B, shapes_of(11008, 32000)) == ModelArgs(
        model_type="llama",
        dim=4096,
        n_layers=32,
        head_dim=128,
        hidden_dim=11008,
        n_heads=32,
        n_kv_heads=32,
        norm_eps=1e-5,
        vocab_size=32000,
    )


def test_mistral_keeps_its_window() -> None:
    args = config(MISTRAL_7B, shapes_of(14336, 32000))
    assert (args.model_type, args.sliding_window, args.n_kv_heads) == ("mistral", 4096, 8)
    assert (args.rope_theta, args.max_seq_len, args.tie_word_embeddings) == (10000.0, None, False)


def test_what_is_stated_is_not_derived() -> None:
    raw = {**LLAMA_2_7B, "n_kv_heads": 8, "head_dim": 64, "hidden_dim": 10, "vocab_size": 7}
    args = config(raw, shapes_of(11008, 32000))
    assert (args.n_kv_heads, args.head_dim, args.hidden_dim, args.vocab_size) == (8, 64, 10, 7)


@pytest.mark.parametrize("stated", [{"vocab_size": -1}, {"vocab_size": None}, {}])
def test_vocabulary_of_a_tied_head_is_that_of_the_embedding(stated: dict[str, Any]) -> None:
    raw = {key: value for key, value in LLAMA_2_7B.items() if key != "vocab_size"} | stated
    args = config(raw, shapes_of(64, 123, tied=True))
    assert (args.vocab_size, args.tie_word_embeddings) == (123, True)


def test_a_head_that_is_stated_and_absent_is_missed() -> None:
    """The model has an own head then, so that the lack of its tensor is found."""
    raw = {**MISTRAL_7B, "tie_word_embeddings": False}
    assert not config(raw, shapes_of(14336, 32000, tied=True)).tie_word_embeddings


def test_a_head_among_the_tensors_is_used_whatever_the_config_says() -> None:
    raw = {**MISTRAL_7B, "tie_word_embeddings": True}
    assert not config(raw, shapes_of(14336, 32000)).tie_word_embeddings


@pytest.mark.parametrize("key", ["max_seq_len", "max_position_embeddings"])
def test_context_has_two_names(key: str) -> None:
    assert config({**WHOLE, key: 8192}, {}).max_seq_len == 8192
    assert key in faults({**WHOLE, key: -1})


def test_rope_theta_may_be_written_as_a_whole_number() -> None:
    theta = config({**WHOLE, "rope_theta": 1000000}, {}).rope_theta
    assert theta == 1e6 and isinstance(theta, float)


def test_written_config_is_read_back() -> None:
    args = config({**LLAMA_2_7B, "max_seq_len": 4096, "rope_theta": 12345.678}, shapes_of(11008, 9, True))
    written = json.loads(json.dumps(plain(args)))
    assert folder_args(SPEC, written) == args
    quantized = {**written, "quantization": {"group_size": 64, "bits": 4}, "quantizer": "affine"}
    assert folder_args(SPEC, quantized) == args


def test_key_heads_follow_from_their_rows() -> None:
    shapes = shapes_of(11008, 32000) | {"layers.0.attention.wk.weight": (1024, 4096)}
    assert config(LLAMA_2_7B, shapes).n_kv_heads == 8
    assert config({**LLAMA_2_7B, "n_kv_heads": 16}, shapes).n_kv_heads == 16
    assert config({**LLAMA_2_7B, "head_dim": 64}, shapes).n_kv_heads == 16


@pytest.mark.parametrize(
    ("raw", "model_type"),
    [
        (LLAMA_2_7B, "llama"),
        (MISTRAL_7B, "mistral"),
        ({**MISTRAL_7B, "sliding_window": None}, "llama"),
        ({**LLAMA_2_7B, "model_type": None}, "llama"),
        ({**MISTRAL_7B, "model_type": "llama"}, "llama"),
        ({**LLAMA_2_7B, "model_type": "qwen"}, None),
        ({**LLAMA_2_7B, "model_type": ["llama"]}, None),
        ({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "sliding_window": 9}, None),
        ({}, None),
    ],
)
def test_what_is_recognised(raw: dict[str, Any], model_type: str | None) -> None:
    args = read(raw, shapes_of(64, 123))
    assert (None if args is None else args.model_type) == model_type


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("rope.freqs", False),
        ("layers.3.attention.inner_attention.rope.freqs", False),
        ("layers.3.attention.wq.weight", True),
        ("output.weight", True),
        ("nothing.we.know", True),
        ("myrope.freqs", True),
    ],
)
def test_names(name: str, kept: bool) -> None:
    found: Any = {name: object()}
    assert tensors(found, config(WHOLE, {})) == (found if kept else {})


def test_frequencies_and_masks_that_are_computed_are_left_out() -> None:
    found: Any = {
        name: object() for name in ("freqs_cis", "freqs_cos", "freqs_sin", "a.attention.mask", "mask")
    }
    assert list(tensors(found, config(WHOLE, {}))) == ["mask"]


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "norm_eps"])
def test_what_cannot_be_derived_is_asked_for(key: str) -> None:
    raw = {name: value for name, value in WHOLE.items() if name != key}
    assert f"{key} is required: " in faults(raw)


def test_what_does_not_follow_is_asked_for() -> None:
    told = faults({"model_type": "llama", "dim": 10, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-5})
    assert "head_dim is required: even width of a head, E, or dim / n_heads" in told
    assert (
        "hidden_dim is required: width of the feed-forward, F, or the rows of layers.0.feed_forward.w1"
        in told
    )
    assert "vocab_size is required: vocabulary, V, or the rows of output.weight" in told


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("dim", -4096, "dim: must be at least 1 and at most 1048576, got -4096"),
        ("dim", "4096", "dim: wanted integer, got '4096'"),
        ("dim", 4096.0, "dim: wanted a whole number, got 4096.0"),
        ("dim", 10**18, "dim: must be at least 1 and at most 1048576, got 1000000000000000000"),
        ("dim", [4096], "dim: wanted a whole number, got [4096]"),
        ("n_layers", True, "n_layers: wanted a whole number, got True"),
        ("n_layers", 100000, "n_layers: must be at least 1 and at most 1024, got 100000"),
        ("n_heads", 0, "n_heads: must be at least 1 and at most 1048576, got 0"),
        ("n_kv_heads", 5, "llama: n_kv_heads: got 5, wanted a divisor of n_heads 32"),
        ("n_kv_heads", 64, "llama: n_kv_heads: got 64, wanted a divisor of n_heads 32"),
        ("head_dim", 127, "llama: head_dim: got 127, wanted an even number"),
        (
            "head_dim",
            1 << 18,
            "llama: n_heads: got 32 of head_dim 262144, wanted a product of at most",
        ),
        ("hidden_dim", -1, "hidden_dim: must be at least 1"),
        ("vocab_size", 0, "vocab_size: must be at least 1"),
        ("vocab_size", -1, "vocab_size is required"),
        ("norm_eps", 0, "norm_eps: must be at least 1e-12 and at most 0.1, got 0.0"),
        ("norm_eps", -1e-5, "norm_eps: must be at least 1e-12"),
        ("norm_eps", math.nan, "norm_eps: wanted a finite number, got nan"),
        ("norm_eps", "1e-5", "norm_eps: wanted number, got '1e-5'"),
        ("rope_theta", math.inf, "rope_theta: wanted a finite number, got inf"),
        ("rope_theta", 0.5, "rope_theta: must be at least 1.0"),
        ("rope_theta", False, "rope_theta: wanted a finite number, got False"),
        ("sliding_window", 0, "sliding_window: must be at least 1"),
        ("sliding_window", [None], "sliding_window: got [None], wanted one width and nulls"),
        ("sliding_window", [4096, 9], "sliding_window: got [4096, 9], wanted one width and nulls"),
        ("sliding_window", [True, None], "sliding_window: got [True, None], wanted one width and nulls"),
        ("sliding_window", [{}, 9], "sliding_window: got [{}, 9], wanted one width and nulls"),
        ("sliding_window", [0, None], "sliding_window: must be at least 1"),
        ("sliding_window", [9] * 3, "sliding_window: got [9, 9, 9], wanted one width and nulls, as many"),
        ("_sliding_window", [None, 4096], "_sliding_window: got [None, 4096], but sliding_window is 4096"),
        ("rms_norm_eps", 1e-6, "rms_norm_eps: got 1e-06, but norm_eps is 1e-05"),
        ("max_seq_len", -2048, "max_seq_len: must be at least 1"),
        ("tie_word_embeddings", "no", "tie_word_embeddings: wanted true/false, got 'no'"),
    ],
)
def test_impossible_values_are_refused(key: str, value: Any, told: str) -> None:
    assert faults({**WHOLE, key: value}).startswith(told)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_scaled_rope", "false"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling_factor", 8),
        ("yarn", {"factor": 16}),
        ("llama_4_scaling", {"beta": 0.1}),
        ("moe", {"num_experts": 8, "num_experts_per_tok": 2}),
        ("num_local_experts", 8),
        ("Sliding_Window", 4096),
        ("sliding_window_pattern", 6),
        ("attention_chunk_size", 8192),
        ("no_rope_layers", [0, 1]),
        ("nope_layer_interval", 4),
        ("use_qk_norm", True),
        ("use_biases", True),
        ("attention_bias", True),
        ("attn_logit_softcapping", 50.0),
        ("attention_multiplier", 0.5),
        ("partial_rotary_factor", 0.5),
        ("partial_rotary_factor", True),
        ("vision_encoder", {"hidden_size": 1024}),
        ("quantization", {"qformat_weight": "fp8_e4m3"}),
        ("quantization_args", {"group_size": 32}),
        ("lora_args", {"rank": 16}),
        ("q_lora_rank", 512),
        ("causal", False),
        ("rope_traditional", False),
        ("hidden_act", "gelu"),
        ("norm_type", "layernorm"),
    ],
)
def test_what_would_change_the_numbers_is_not_dropped(key: str, value: Any) -> None:
    told = faults({**WHOLE, key: value})
    assert told.startswith(f"{key}: got ") and ("is not supported" in told or "is built here" in told)
    assert config({**WHOLE, key: None}, {}) == config(WHOLE, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_scaled_rope", False),
        ("use_scaled_rope", 0),
        ("rope_scaling", {}),
        ("rope_scaling", {"rope_type": "default"}),
        ("yarn", []),
        ("moe", {}),
        ("num_experts", 0),
        ("use_biases", False),
        ("attention_bias", False),
        ("use_qk_norm", False),
        ("causal", True),
        ("hidden_act", "silu"),
        ("partial_rotary_factor", 1.0),
        ("quantization", None),
        ("lora", None),
        ("_comment", "of my own"),
        ("//", "a note"),
        ("$schema", "https://example.org"),
        ("name", "tiny"),
        ("multiple_of", 256),
        ("ffn_dim_multiplier", 1.3),
        ("max_batch_size", 32),
        ("model_parallel_size", 8),
        ("torch_dtype", "bfloat16"),
        ("dtype", "bfloat16"),
        ("bos_token_id", 1),
        ("pad_id", -1),
        ("attention_dropout", 0.1),
        ("resid_dropout", 0.0),
        ("initializer_range", 0.02),
        ("depth_init", True),
        ("use_cache", True),
        ("use_flash_attention", True),
        ("architectures", ["LlamaForCausalLM"]),
        ("transformers_version", "4.40.0"),
        ("whatever", None),
        ("whatever", {}),
    ],
)
def test_what_has_no_effect_passes(key: str, value: Any) -> None:
    assert config({**WHOLE, key: value}, {}) == config(WHOLE, {})


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("rope_thetta", 5e5, "did you mean 'rope_theta'?"),
        ("Rope_Theta", 5e5, "did you mean 'rope_theta'?"),
        ("n_kv_head", 4, "did you mean 'n_kv_heads'?"),
        ("rope_base", 5e5, ""),
        ("swish_beta", 2, ""),
        ("whatever", 1, ""),
        ("whatever", False, ""),
    ],
)
def test_a_key_that_nobody_knows_is_refused(key: str, value: Any, hint: str) -> None:
    told = faults({**WHOLE, key: value})
    assert told.startswith(f"unknown: {key} {value!r}") and hint in told
    many = faults({**WHOLE, **{f"key{n}" * 50: "x" * 5000 for n in range(1000)}})
    assert "and 992 more" in many and len(many) < 2000


def test_a_window_that_is_stated_and_not_used_does_not_count() -> None:
    assert config({**WHOLE, "use_sliding_window": False}, {}).sliding_window is None
    assert config({**WHOLE, "use_sliding_window": True}, {}) == config(WHOLE, {})


@pytest.mark.parametrize("off", [False, [], {}, None])
def test_a_window_that_is_off_is_none(off: Any) -> None:
    assert config({**WHOLE, "sliding_window": off}, {}).sliding_window is None
    assert config({**MISTRAL_7B, "sliding_window": off}, {}).rope_theta == 1e6


@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
def test_mistral_lists_the_windows_of_layers(key: str) -> None:
    """The list stands for the first layers, and again for those above them."""
    raw = {k: v for k, v in WHOLE.items() if k != "sliding_window"}
    args = config({**raw, key: [None, 512, 512, 512]}, {})
    assert args.sliding_window == 512
    assert args.window_layers == tuple(i for i in range(32) if i % 4)
    assert config({**raw, key: [512, 512]}, {}) == config({**raw, "sliding_window": 512}, {})


@pytest.mark.parametrize("stated", [True, False])
def test_mistral_calls_a_tied_head_by_its_own_name(stated: bool) -> None:
    shapes = shapes_of(14336, 32000, tied=True)
    assert config({**MISTRAL_7B, "tied_embeddings": stated}, shapes).tie_word_embeddings is stated


# Mistral 7B v0.2 as it was released: its reader takes 1e6 where there is neither a window nor a theta.
MISTRAL_V02 = {key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"}


@pytest.mark.parametrize(
    ("raw", "theta", "told"),
    [
        (LLAMA_2_7B, 1e4, None),
        ({**LLAMA_2_7B, "ffn_dim_multiplier": 1.3, "multiple_of": 4096}, 1e4, None),
        ({**LLAMA_2_7B, "rope_theta": 5e5}, 5e5, None),
        (MISTRAL_7B, 1e4, "10000.0 is taken, as Mistral's"),
        (MISTRAL_V02, 1e6, "1000000.0 is taken, as Mistral's"),
        ({**MISTRAL_V02, "sliding_window": None, "rope_theta": None}, 1e6, "1000000.0 is taken"),
        ({**MISTRAL_V02, "rope_theta": 1e4}, 1e4, None),
        ({**MISTRAL_V02, "model_type": "transformer"}, 1e6, "1000000.0 is taken"),
        ({**MISTRAL_V02, "model_type": "mistral"}, 1e6, "1000000.0 is taken"),
        ({**MISTRAL_V02, "model_type": "llama"}, 1e4, "10000.0 is taken, as Llama"),
        ({**MISTRAL_V02, "multiple_of": 256}, 1e4, None),
        ({k: v for k, v in MISTRAL_V02.items() if k != "head_dim"}, 1e6, "1000000.0 is taken"),
        ({k: v for k, v in LLAMA_2_7B.items() if k != "multiple_of"}, 1e4, "10000.0 is taken, as Llama"),
    ],
)
def test_theta_is_that_of_the_family_and_what_was_assumed_is_told(
    raw: dict[str, Any], theta: float, told: str | None
) -> None:
    shapes = shapes_of(11008, 32000)
    assert config(raw, shapes).rope_theta == theta
    about = [note for note in notes(raw, shapes) if "rope_theta" in note]
    assert told in about[0] if told else not about


@pytest.mark.parametrize("absent", ["n_layers", "n_heads", "dim", "n_kv_heads", "head_dim", "hidden_dim"])
def test_a_width_that_is_left_out_is_read_off_the_tensors(absent: str) -> None:
    raw = {**MISTRAL_7B, "rope_theta": 1e4}
    shapes = shapes_of(14336, 32000) | {f"layers.{n}.attention.wq.weight": (4096, 4096) for n in range(32)}
    shapes |= {"layers.0.attention.wk.weight": (1024, 4096)}
    short = {key: value for key, value in raw.items() if key != absent}
    assert config(short, shapes) == config(raw, shapes)
    told = f"params.json leaves out what the tensors tell: {absent} {raw[absent]}"
    assert notes(short, shapes) == ([] if absent in ("head_dim", "hidden_dim") else [told])


def test_what_no_tensor_tells_is_named_and_not_the_whole_config() -> None:
    raw = {key: value for key, value in LLAMA_2_7B.items() if key not in ("n_layers", "n_heads")}
    told = faults(raw, shapes_of(11008, 32000))
    assert "n_heads is required" in told and "n_layers" not in told


def test_hugging_faces_layout_is_named() -> None:
    told = faults({**LLAMA_2_7B, "hidden_size": 4096})
    assert told == "is a config of Hugging Face (hidden_size), wanted Meta's or Mistral's params.json"
    theirs = {"model.layers.0.self_attn.q_proj.weight": (4096, 4096)}
    assert "the tensors are named as Hugging Face's" in faults(LLAMA_2_7B, theirs)


LLAMA_3_2 = {**LLAMA_2_7B, "n_kv_heads": 8, "rope_theta": 5e5, "use_scaled_rope": True}


@pytest.mark.parametrize(
    ("change", "factor", "high"),
    [
        ({}, 8.0, 4.0),
        ({"rope_scaling_factor": 32}, 32.0, 4.0),
        ({"rope_scaling_factor": None, "rope_high_freq_factor": 2.0}, 8.0, 2.0),
    ],
)
def test_scaled_positions_are_those_of_meta_s_own_reader(
    change: dict[str, Any], factor: float, high: float
) -> None:
    shapes = shapes_of(11008, 128256)
    args = config(LLAMA_3_2 | change, shapes)
    assert (args.rope_scaling, args.rope_factor, args.rope_original_len) == ("llama3", factor, 8192)
    assert (args.rope_low_freq_factor, args.rope_high_freq_factor) == (1.0, high)
    told = notes(LLAMA_3_2 | change, shapes)
    assert bool(told) == (change.get("rope_scaling_factor") is None)
    assert all(note.startswith("params.json says use_scaled_rope and not by how much: 8.0") for note in told)


def test_a_factor_without_scaled_positions_is_refused() -> None:
    raw = {key: value for key, value in LLAMA_3_2.items() if key != "use_scaled_rope"}
    shapes = shapes_of(11008, 128256)
    assert "rope_scaling_factor: got 32" in faults({**raw, "rope_scaling_factor": 32}, shapes)
    told = faults({**LLAMA_3_2, "rope_scaling_factor": "x"}, shapes)
    assert told == "rope_scaling_factor: wanted number or none, got 'x'"


def test_all_faults_are_told_in_one_line() -> None:
    raw = {"dim": -1, "n_layers": "two", "n_heads": 6, "n_kv_heads": 0, "norm_eps": True}
    told = faults({**raw, "use_scaled_rope": "yes"})
    for key in ("use_scaled_rope", "dim", "n_layers", "n_kv_heads", "norm_eps"):
        assert f"{key}: " in told
    assert "hidden_dim is required" in told and " n_heads: " not in told
    told = faults({**WHOLE, "n_heads": 6, "n_kv_heads": 4, "head_dim": 3})
    assert "n_kv_heads: got 4" in told and "head_dim: got 3" in told


def test_an_odd_shape_is_no_crash() -> None:
    raw = {**LLAMA_2_7B, "norm_eps": 1e-5}
    told = faults(raw, {"output.weight": (), "layers.0.feed_forward.w1.weight": (1 << 40, 4096)})
    assert "vocab_size is required" in told
    assert "hidden_dim: must be at least 1 and at most 1048576, got 1099511627776" in told


def test_a_foreign_value_cannot_forge_a_line_or_fill_the_screen() -> None:
    with pytest.raises(ModelError) as caught:
        config({**WHOLE, "dim": "\n\x1b[2J" + "x" * 5000}, {})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
