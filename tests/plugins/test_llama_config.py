"""What the llama architecture makes of a config: derived, checked, refused."""

from __future__ import annotations

import json
import math
from typing import Any

import llama_torch
import pytest
from mlxlora_llama import config, rename
from mlxlora_llama.config import ModelArgs, detect

from mlxlora_core.errors import ExitCode, ModelError
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


def shapes_of(hidden: int, vocab: int, tied: bool = False) -> dict[str, tuple[int, ...]]:
    small = {"dim": 4096, "hidden_dim": hidden, "vocab_size": vocab, "n_layers": 1}
    return llama_torch.shapes({**small, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128}, tied=tied)


def faults(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        config(raw, shapes or {})
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
    assert config(written, {}) == args
    quantized = {**written, "quantization": {"group_size": 64, "bits": 4}, "quantizer": "affine"}
    assert config(quantized, {}) == args


@pytest.mark.parametrize(
    ("raw", "model_type"),
    [
        (LLAMA_2_7B, "llama"),
        (MISTRAL_7B, "mistral"),
        ({**MISTRAL_7B, "sliding_window": None}, "llama"),
        ({**LLAMA_2_7B, "model_type": None}, "llama"),
        (WHOLE, None),
        ({"dim": 64, "n_layers": 2}, None),
        ({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "sliding_window": 9}, None),
        ({}, None),
    ],
)
def test_what_is_recognised(raw: dict[str, Any], model_type: str | None) -> None:
    assert detect(raw) == model_type


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("rope.freqs", None),
        ("layers.3.attention.inner_attention.rope.freqs", None),
        ("layers.3.attention.wq.weight", "layers.3.attention.wq.weight"),
        ("output.weight", "output.weight"),
        ("nothing.we.know", "nothing.we.know"),
        ("myrope.freqs", "myrope.freqs"),
    ],
)
def test_names(name: str, renamed: str | None) -> None:
    assert rename(name) == renamed


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "norm_eps"])
def test_what_cannot_be_derived_is_asked_for(key: str) -> None:
    raw = {name: value for name, value in WHOLE.items() if name != key}
    assert f"{key}: is missing, wanted a" in faults(raw)


def test_what_does_not_follow_is_asked_for() -> None:
    told = faults({"model_type": "llama", "dim": 10, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-5})
    assert "head_dim: is missing and does not follow from dim 10 / n_heads 4" in told
    assert "hidden_dim: is missing and does not follow from the rows of layers.0.feed_forward.w1" in told
    assert "vocab_size: is missing and does not follow from the rows of output.weight" in told


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("dim", -4096, "dim: got -4096, wanted a whole number from 1 to 1048576"),
        ("dim", "4096", "dim: got '4096', wanted a whole number"),
        ("dim", 4096.0, "dim: got 4096.0, wanted a whole number"),
        ("dim", 10**18, "dim: got 1000000000000000000, wanted"),
        ("dim", [4096], "dim: got [4096], wanted"),
        ("n_layers", True, "n_layers: got True, wanted"),
        ("n_layers", 100000, "n_layers: got 100000, wanted a whole number from 1 to 1024"),
        ("n_heads", 0, "n_heads: got 0, wanted"),
        ("n_kv_heads", 5, "n_kv_heads: got 5, wanted a divisor of n_heads 32"),
        ("n_kv_heads", 64, "n_kv_heads: got 64, wanted a divisor of n_heads 32"),
        ("head_dim", 127, "head_dim: got 127, wanted an even number"),
        ("head_dim", 1 << 18, "n_heads: got 32 of head_dim 262144, wanted a product of at most 1048576"),
        ("hidden_dim", -1, "hidden_dim: got -1, wanted"),
        ("vocab_size", 0, "vocab_size: got 0, wanted"),
        ("vocab_size", -1, "vocab_size: is missing and does not follow"),
        ("norm_eps", 0, "norm_eps: got 0, wanted a number from 1e-12 to 0.1"),
        ("norm_eps", -1e-5, "norm_eps: got -1e-05, wanted"),
        ("norm_eps", math.nan, "norm_eps: got nan, wanted"),
        ("norm_eps", "1e-5", "norm_eps: got '1e-5', wanted"),
        ("rope_theta", math.inf, "rope_theta: got inf, wanted a number from 1.0 to 1000000000000.0"),
        ("rope_theta", 0.5, "rope_theta: got 0.5, wanted"),
        ("rope_theta", False, "rope_theta: got False, wanted"),
        ("sliding_window", 0, "sliding_window: got 0, wanted"),
        ("sliding_window", [None, 4096], "sliding_window: got [None, 4096], wanted"),
        ("max_seq_len", -2048, "max_seq_len: got -2048, wanted"),
        ("tie_word_embeddings", "no", "tie_word_embeddings: got 'no', wanted true or false"),
        ("model_type", "qwen", "model_type: got 'qwen', wanted llama or mistral"),
        ("model_type", ["llama"], "model_type: got ['llama'], wanted llama or mistral"),
    ],
)
def test_impossible_values_are_refused(key: str, value: Any, told: str) -> None:
    assert faults({**WHOLE, key: value}).startswith(told)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_scaled_rope", True),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("yarn", {"factor": 16}),
        ("moe", {"num_experts": 8, "num_experts_per_tok": 2}),
    ],
)
def test_what_would_change_the_numbers_is_not_dropped(key: str, value: Any) -> None:
    told = faults({**WHOLE, key: value})
    assert told.startswith(f"{key}: got ") and told.endswith("is not supported")
    assert config({**WHOLE, key: None}, {}) == config(WHOLE, {})


def test_scaled_rope_that_is_off_is_fine() -> None:
    assert config({**WHOLE, "use_scaled_rope": False}, {}) == config(WHOLE, {})


def test_all_faults_are_told_in_one_line() -> None:
    raw = {"dim": -1, "n_layers": "two", "n_heads": 6, "n_kv_heads": 4, "head_dim": 3, "norm_eps": True}
    told = faults({**raw, "use_scaled_rope": True})
    for key in ("use_scaled_rope", "dim", "n_layers", "n_kv_heads", "head_dim", "norm_eps", "hidden_dim"):
        assert f"{key}: " in told
    assert "n_heads: " not in told


def test_an_odd_shape_is_no_crash() -> None:
    raw = {**LLAMA_2_7B, "norm_eps": 1e-5}
    told = faults(raw, {"output.weight": (), "layers.0.feed_forward.w1.weight": (1 << 40, 4096)})
    assert "vocab_size: is missing" in told
    assert "hidden_dim: got 1099511627776 from the rows of layers.0.feed_forward.w1.weight" in told


def test_a_foreign_value_cannot_forge_a_line_or_fill_the_screen() -> None:
    with pytest.raises(ModelError) as caught:
        config({**WHOLE, "dim": "\n\x1b[2J" + "x" * 5000}, {})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
