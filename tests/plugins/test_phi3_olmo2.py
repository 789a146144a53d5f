"""Phi-3 and OLMo 2 against torch in float64, their configs, and the text that outgrows its positions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hf_folder
import mlx.core as mx
import mlxlora_olmo2
import mlxlora_phi3
import numpy as np
import phi3_olmo2_torch
import pytest
import torch
from mlx.utils import tree_flatten
from mlxlora_phi3.rope import attention_factor

from mlxlora_core import plugins
from mlxlora_core.api import LazyTensor
from mlxlora_core.errors import ModelError
from mlxlora_core.files import ordered_rows, some_rows
from mlxlora_core.model import architectures
from mlxlora_core.model.architectures import folder_args
from mlxlora_core.model.linears import parameters
from mlxlora_core.options import plain

pytestmark = pytest.mark.usefixtures("one_torch_thread")

REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
SPECS = {
    spec.name: spec for plugin in (mlxlora_phi3, mlxlora_olmo2) for spec in plugin.mlxlora_architectures()
}
BASE: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 50,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "max_position_embeddings": 512,
}
LONGROPE = {
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 4.0, 7.0, 9.0],
    },
    "original_max_position_embeddings": 16,
}
PARTLY = {
    **LONGROPE,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 7.0]},
}
OLMO2 = {**BASE, "model_type": "olmo2"}
MODELS: dict[str, dict[str, Any]] = {
    "phi3": BASE,
    "a window": {**BASE, "sliding_window": 5},
    "part of a head": {**BASE, "partial_rotary_factor": 0.5},
    "longrope": {**BASE, **LONGROPE},
    "all of phi3": {**BASE, **PARTLY, "sliding_window": 7, "num_key_value_heads": 4},
    "olmo2": OLMO2,
    "olmo2 with biases": {**OLMO2, "attention_bias": True, "head_dim": 6},
}
TOKENS = 24


def args_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
    shapes = phi3_olmo2_torch.shapes(config) if shapes is None else shapes
    return SPECS[config["model_type"]].layouts["hf"].read(config, shapes)


def both(config: dict[str, Any], tied: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    """Our model, and the reference's weights in float64, the same numbers."""
    weights = {n: w.double() for n, w in phi3_olmo2_torch.random_weights(config, tied=tied).items()}
    args = args_of(config, {name: tuple(w.shape) for name, w in weights.items()})
    model: Any = SPECS[config["model_type"]].build(args)
    sizes = {name: len(value) for name, value in tree_flatten(model.parameters())}
    ours = []
    for entry in SPECS[config["model_type"]].layouts["hf"].table(args):
        array = mx.array(weights[entry.foreign].float().numpy())
        tensor = LazyTensor(array.shape, "float32", lambda array=array: array)
        if entry.start is not None:
            tensor = some_rows(tensor, entry.start, sizes[entry.name])
        ours.append((entry.name, (ordered_rows(tensor, entry.rows) if entry.rows else tensor).read()))
    model.load_weights(ours)
    return model, weights


def some_ids(tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(3).integers(0, BASE["vocab_size"], (2, tokens))


def far(got: mx.array, want: torch.Tensor) -> float:
    """How far apart two results are, as a part of the largest number."""
    exact = want.detach().numpy()
    return float(np.abs(np.array(got) - exact).max() / np.abs(exact).max())


def wanted(weights: Mapping[str, torch.Tensor], ids: np.ndarray, config: Mapping[str, Any]) -> torch.Tensor:
    return phi3_olmo2_torch.logits(weights, torch.from_numpy(ids), config)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, TOKENS])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_torch(name: str, tokens: int) -> None:
    """In texts that are shorter and longer than the original length."""
    model, weights = both(MODELS[name], tied=name in ("a window", "all of phi3"))
    assert far(model(mx.array(some_ids(tokens))), wanted(weights, some_ids(tokens), MODELS[name])) < 1e-5


@pytest.mark.parametrize("name", ["a window", "part of a head", "longrope"])
def test_what_sets_a_model_apart_counts(name: str) -> None:
    """So that the numbers above cannot agree without it."""
    _, weights = both(MODELS[name])
    less = {key: value for key, value in MODELS[name].items() if key in BASE}
    want = wanted(weights, some_ids(), MODELS[name])
    assert float((want - wanted(weights, some_ids(), less)).abs().max() / want.abs().max()) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd(name: str) -> None:
    model, weights = both(MODELS[name])
    ids = some_ids()
    slope = np.random.default_rng(4).standard_normal((2, TOKENS, BASE["vocab_size"]))
    table = {e.name: e for e in SPECS[MODELS[name]["model_type"]].layouts["hf"].table(args_of(MODELS[name]))}

    def ours(parameters: Any) -> mx.array:
        model.update(parameters)
        return (model(mx.array(ids)) * mx.array(slope.astype(np.float32))).sum()

    got = dict(tree_flatten(mx.grad(ours)(model.trainable_parameters())))
    leaves = {name: w.requires_grad_() for name, w in weights.items()}
    (wanted(leaves, ids, MODELS[name]) * torch.from_numpy(slope)).sum().backward()
    for key, gradient in got.items():
        entry = table[key]
        theirs = leaves[entry.foreign].grad
        assert theirs is not None
        start = entry.start or 0
        part = theirs[start : start + len(gradient)]
        if not key.endswith("wk.bias"):
            assert far(gradient, part if entry.rows is None else part[list(entry.rows)]) < 1e-4, key


@pytest.mark.parametrize("name", ["longrope", "all of phi3"])
@pytest.mark.parametrize("lengths", [(16, 1, 1, 6), (17, 1, 6), (5, 4, 15), (15, 1, 1, 1, 6), (1,) * TOKENS])
def test_a_text_is_read_again_when_it_outgrows_the_original_length(
    name: str, lengths: tuple[int, ...]
) -> None:
    """After each part its logits are those of the text so far, whole."""
    model, weights = both(MODELS[name])
    ids, cache, stop = some_ids(), model.make_cache(), 0
    for length in lengths:
        start, stop = stop, stop + length
        got = model(mx.array(ids[:, start:stop]), cache=cache)
        assert [entry.offset for entry in cache] == [stop] * len(cache)
        assert far(got, wanted(weights, ids[:, :stop], MODELS[name])[:, start:]) < 1e-5


@pytest.mark.parametrize("lengths", [(5, 20, 40), (40, 3, 16, 17, 2), (20, 17), (16, 2)], ids=str)
def test_packed_rows_turn_each_by_its_own_length(lengths: tuple[int, ...]) -> None:
    """Short and long ones in any order, as torch has each alone."""
    config = {**BASE, **PARTLY}
    model, weights = both(config)
    ids = some_ids(sum(lengths))[:1]
    got = model.head(model.run(model.embed(mx.array(ids)), lengths=lengths))
    start = 0
    for length in lengths:
        row = slice(start, start + length)
        assert far(got[:, row], wanted(weights, ids[:, row], config)) < 1e-4
        start += length


def test_a_long_text_is_read_again_in_parts() -> None:
    """More of them than are read at a time."""
    config = {**BASE, **LONGROPE, "original_max_position_embeddings": 600, "max_position_embeddings": 4096}
    model, weights = both(config)
    ids, cache = some_ids(603), model.make_cache()
    model(mx.array(ids[:, :512]), cache=cache)
    model(mx.array(ids[:, 512:600]), cache=cache)
    assert cache[0].entered and not cache[1].entered
    got = model(mx.array(ids[:, 600:]), cache=cache)
    assert not cache[0].entered
    assert far(got, wanted(weights, ids, config)[:, 600:]) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_arguments_come_back_from_a_config(name: str) -> None:
    args = args_of(MODELS[name])
    written = {key: value for key, value in plain(args).items() if value is not None}
    assert folder_args(SPECS[args.model_type], written) == args


def test_a_model_without_flags_says_nothing_of_them() -> None:
    told = {key for key, value in plain(args_of(BASE)).items() if value is not None}
    common = {"model_type", "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps"}
    assert told == common | {"vocab_size", "rope_theta", "max_seq_len", "tie_word_embeddings"}
    assert {key for key, value in plain(args_of(OLMO2)).items() if value is not None} == told


@pytest.mark.parametrize("name", ["all of phi3", "olmo2"])
def test_a_packed_folder_of_mlx_lm_stays_packed(tmp_path: Path, name: str) -> None:
    """A fused weight is taken apart, and rows put in order, without unpacking it."""
    config = {**MODELS[name], "intermediate_size": 64}
    dense = {n: mx.array(w.numpy()) for n, w in phi3_olmo2_torch.random_weights(config).items()}
    table = {"group_size": 32, "bits": 4}
    stated = {**config, "auto_map": {"AutoModel": "modeling.Model"}, "quantization": table}
    hf_folder.write(tmp_path, hf_folder.packed(dense, {}), stated)
    loader = REGISTRY.find("loader", "hf").spec
    foreign = loader.open(tmp_path, loader.options())
    assert any("auto_map" in note and "not run" in note for note in foreign.notes)
    component, args = architectures.read_foreign(foreign, REGISTRY, tmp_path)
    model = architectures.build(component, args)
    tensors = architectures.model_tensors(component, foreign, args, parameters(model))
    matrices = {key for key, value in parameters(model).items() if value.ndim == 2}
    assert {key for key, tensor in tensors.items() if tensor.packed is not None} == matrices
    for key in matrices:
        packed = tensors[key].packed
        assert packed is not None
        parts = (packed.parts[part].read() for part in ("weight", "scales", "biases"))
        assert mx.allclose(mx.dequantize(*parts, 32, 4), tensors[key].read(), atol=1e-6).item()
    model.load_weights([(key, tensor.read()) for key, tensor in tensors.items()])
    plainly = {n: w if w.ndim < 2 else mx.dequantize(*mx.quantize(w, 32, 4), 32, 4) for n, w in dense.items()}
    weights = {n: torch.from_numpy(np.array(w)).double() for n, w in plainly.items()}
    assert far(model(mx.array(some_ids())), wanted(weights, some_ids(), config)) < 5e-5


# --- config.json ------------------------------------------------------------------

#: what Phi-4-mini-instruct states, but for its divisors
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 199999,
    "embd_pdrop": 0.0,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 200064,
}


def test_the_config_of_phi_4_mini_is_read() -> None:
    args = args_of(PHI_4_MINI, {})
    assert (args.head_dim, args.turned, args.n_kv_heads, args.sliding_window) == (128, 96, 8, 262144)
    assert args.rope_attention_factor == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5, rel=1e-12)
    assert args.tie_word_embeddings and args.rope_original_len == 4096
    (note,) = SPECS["phi3"].layouts["hf"].notes(PHI_4_MINI, {})
    assert "of up to 4096 tokens" in note
    head = {"lm_head.weight": (200064, 3072)}
    assert not args_of(PHI_4_MINI, head).tie_word_embeddings
    assert len(SPECS["phi3"].layouts["hf"].notes(PHI_4_MINI, head)) == 2


def test_both_spellings_of_the_rope_are_one() -> None:
    config = {**BASE, **PARTLY}
    new = {key: value for key, value in config.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaling = {**new.pop("rope_scaling"), "rope_theta": 100.0, "partial_rotary_factor": 0.75}
    new["rope_parameters"] = {"rope_type": scaling.pop("type"), **scaling}
    assert args_of(new) == args_of(config)
    olmo2 = {key: value for key, value in OLMO2.items() if key != "rope_theta"}
    parameters = {"rope_type": "default", "rope_theta": 100.0}
    assert args_of({**olmo2, "rope_parameters": parameters}) == args_of(OLMO2)


def test_the_factor_is_one_where_texts_grow_no_longer() -> None:
    assert attention_factor(1.0, 16) == attention_factor(0.5, 16) == attention_factor(4.0, 1) == 1.0
    assert attention_factor(16.0, 16) == pytest.approx(2**0.5)


SCALING = PARTLY["rope_scaling"]
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (BASE, {"rope_theta": None}, "rope_theta is required"),
    (BASE, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "only default and longrope are built here"),
    (BASE, {"partial_rotary_factor": 1.5}, "partial_rotary_factor: got 1.5, wanted a number above 0"),
    (BASE, {"partial_rotary_factor": 0.4}, "wanted an even number of at most 8"),
    (BASE, {"partial_rotary_factor": "x"}, "partial_rotary_factor: got 'x'"),
    (BASE, {"num_local_experts": 4}, "num_local_experts: got 4, which asks for a mixture of experts"),
    (BASE, {"attention_bias": True}, "attention_bias: got True, which asks for linears with a bias"),
    (BASE, {"no_such_key": 3}, "unknown: no_such_key 3"),
    (BASE, {"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
    (BASE, {"full_attn_mod": 2}, "full_attn_mod: got 2"),
    (BASE, {"num_key_value_heads": 3}, "wanted a divisor of n_heads 4"),
    (BASE, {"sliding_window": 0}, "sliding_window: must be at least 1"),
    (BASE, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({**BASE, **PARTLY}, {"original_max_position_embeddings": None}, "is required by rope_type longrope"),
    ({**BASE, **PARTLY}, {"max_position_embeddings": None}, "max_position_embeddings is required by"),
    ({**BASE, **PARTLY}, {"max_position_embeddings": 10**400}, "max_position_embeddings"),
    ({**BASE, **PARTLY}, {"partial_rotary_factor": 1}, "got 3, wanted 4, one for each turned pair"),
    ({**BASE, **PARTLY}, {"rope_scaling": {**SCALING, "short_factor": [1, 0, 2]}}, "short_factor"),
    ({**BASE, **PARTLY}, {"rope_scaling": {**SCALING, "long_factor": 3}}, "long_factor"),
    ({**BASE, **PARTLY}, {"rope_scaling": {**SCALING, "factor": "x"}}, "factor: got 'x'"),
    ({**BASE, **PARTLY}, {"rope_scaling": {**SCALING, "short_mscale": 2}}, "unknown: short_mscale 2"),
    (OLMO2, {"rope_theta": None}, "rope_theta is required"),
    (OLMO2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "but only default is built here"),
    (OLMO2, {"sliding_window": 4096}, "sliding_window: got 4096, which asks for a window"),
    (OLMO2, {"clip_qkv": 8.0}, "unknown: clip_qkv 8.0"),
    (OLMO2, {"attention_bias": 1}, "attention_bias"),
    (OLMO2, {"head_dim": 7}, "head_dim: got 7, wanted an even number"),
    (OLMO2, {"hidden_size": 10**400}, "hidden_size"),
]


@pytest.mark.parametrize(("config", "change", "told"), REFUSED)
def test_what_is_not_built_is_refused(config: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError) as caught:
        args_of({**config, **change}, {})
    assert told in caught.value.what
    assert "\n" not in str(caught.value)


# --- GGUF -------------------------------------------------------------------------

GGUF: dict[str, Any] = {
    "general.architecture": "phi3",
    "general.name": "Phi",
    "phi3.embedding_length": 32,
    "phi3.block_count": 2,
    "phi3.attention.head_count": 4,
    "phi3.attention.head_count_kv": 2,
    "phi3.feed_forward_length": 40,
    "phi3.attention.layer_norm_rms_epsilon": 1e-5,
    "phi3.rope.freq_base": 100.0,
    "phi3.rope.dimension_count": 6,
    "phi3.context_length": 512,
    "phi3.attention.sliding_window": 0,
    "phi3.rope.scaling.original_context_length": 16,
    "phi3.rope.scaling.attn_factor": (1 + np.log(32) / np.log(16)) ** 0.5,
    "rope_factors_short.weight": [1.0, 1.5, 2.0],
    "rope_factors_long.weight": [2.0, 4.0, 7.0],
}
OLMO2_GGUF = {
    key.replace("phi3", "olmo2"): "olmo2" if value == "phi3" else value
    for key, value in GGUF.items()
    if not any(word in key for word in ("scaling", "factors", "window", "dimension"))
}
GGUF_SHAPES = {"token_embd.weight": (50, 32), "output.weight": (50, 32)}


def gguf_args(raw: Mapping[str, Any]) -> Any:
    return SPECS[raw["general.architecture"]].layouts["gguf"].read(raw, GGUF_SHAPES)


def test_keys_of_gguf_are_the_same_model() -> None:
    assert gguf_args(GGUF) == args_of({**BASE, **PARTLY})
    assert gguf_args(OLMO2_GGUF) == args_of(OLMO2)
    unscaled = {key: value for key, value in GGUF.items() if "factors" not in key and "attn_f" not in key}
    assert gguf_args({**unscaled, "phi3.rope.dimension_count": 8}) == args_of(BASE)


@pytest.mark.parametrize(
    ("raw", "change", "told"),
    [
        (GGUF, {"rope_factors_long.weight": None}, "rope_long_divisors: the other rope_ values need it"),
        (GGUF, {"phi3.rope.dimension_count": 10}, "rotary_dim: got 10, wanted an even number of at most 8"),
        (GGUF, {"phi3.rope.scaling.type": "yarn"}, "phi3.rope.scaling.type: got 'yarn'"),
        (GGUF, {"phi3.expert_count": 8}, "phi3.expert_count: got 8"),
        (GGUF, {"phi3.attention.value_length": 4}, "phi3.attention.value_length: got 4, wanted the width"),
        (GGUF, {"phi3.no_such": 1}, "unknown: phi3.no_such 1"),
        (GGUF, {"rope_freqs.weight": [1.0]}, "rope_freqs.weight"),
        (OLMO2_GGUF, {"olmo2.attention.sliding_window": 4096}, "olmo2.attention.sliding_window: got 4096"),
        (OLMO2_GGUF, {"olmo2.rope.scaling.type": "yarn"}, "olmo2.rope.scaling.type: got 'yarn'"),
        (
            OLMO2_GGUF,
            {"olmo2.rope.dimension_count": 4},
            "olmo2.rope.dimension_count: got 4, wanted the width",
        ),
    ],
)
def test_keys_of_gguf_that_are_not_built_are_refused(
    raw: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelError) as caught:
        gguf_args({**raw, **change})
    assert told in caught.value.what


def test_notes_of_gguf_say_what_llama_cpp_does_otherwise() -> None:
    notes = SPECS["phi3"].layouts["gguf"].notes
    assert notes is not None
    without = {key: value for key, value in GGUF.items() if "freq_base" not in key}
    told = notes({**without, "phi3.attention.sliding_window": 100}, GGUF_SHAPES)
    assert all(words in note for words, note in zip(("freq_base", "up to 16", "100"), told, strict=True))
    assert notes({**GGUF, "phi3.attention.sliding_window": 2000}, GGUF_SHAPES) == told[1:2]
    assert SPECS["olmo2"].layouts["gguf"].notes(OLMO2_GGUF, GGUF_SHAPES) == []
