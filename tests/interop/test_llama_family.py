"""Tiny random models that transformers makes of each family of ``llama`` compute here what they do there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import small_tokenizers
import torch
from mlx.utils import tree_unflatten
from theirs import random_model, spellings

from mlxlora_core import plugins
from mlxlora_core.api import ForeignModel, LazyTensor
from mlxlora_core.files.tensor_checks import mismatches
from mlxlora_core.model import architectures, loading
from mlxlora_core.model.linears import parameters

transformers: Any = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'mlxlora[interop]'"
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")
REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
HERE = Path("a checkpoint")
TOKENS = 70  # more than any window and any original length below
BASE = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
#: in the spelling of transformers before 5
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 5e5},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, heads of their own width": {"model_type": "llama", "head_dim": 10, "num_key_value_heads": 6},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral without a window": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "ministral": {
        "model_type": "ministral",
        "head_dim": 10,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "smollm3": {"model_type": "smollm3", "rope_theta": 2e6},
    "smollm3, layers without positions": {"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 0]},
    "smollm3 with windows": {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2 with windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 2,
    },
    "qwen2, a window that is not used": {"model_type": "qwen2", "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "qwen3 with windows": {
        "model_type": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "attention_bias": True,
    },
    "linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "model_type": "llama",
        "rope_theta": 100.0,
        "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 16, **LLAMA3},
    },
    "yarn": {"model_type": "qwen2", "rope_theta": 100.0, "rope_scaling": YARN},
    "yarn of another shape": {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_theta": 100.0,
        "rope_scaling": {
            **YARN,
            "beta_fast": 3.0,
            "beta_slow": 0.5,
            "truncate": False,
            "attention_factor": 1.3,
        },
    },
    "yarn by mscale": {
        "model_type": "mistral",
        "sliding_window": None,
        "rope_theta": 100.0,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
}


def their_model(
    family: dict[str, Any], tied: bool, dtype: torch.dtype
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of theirs in float64, and its weights in ``dtype``, the same numbers."""
    made = transformers.AutoConfig.for_model(**{**BASE, **family, "tie_word_embeddings": tied})
    return random_model(transformers, made, dtype)


def both_spellings(model: Any, family: dict[str, Any], tied: bool) -> dict[str, dict[str, Any]]:
    """config.json in the new spelling and in the old one."""
    stated = {"rope_theta": BASE["rope_theta"], **family, "tie_word_embeddings": tied}
    return spellings(model, stated, ["rope_parameters"])


def lazy(weight: torch.Tensor) -> LazyTensor:
    """A tensor of theirs as a loader gives it."""
    dtype = str(weight.dtype).removeprefix("torch.")
    half = weight.dtype == torch.bfloat16
    array = mx.array(weight.view(torch.uint16).numpy()).view(mx.bfloat16) if half else weight.numpy()
    return LazyTensor(tuple(weight.shape), dtype, lambda: mx.array(array))


def opened(
    config: dict[str, Any], weights: dict[str, torch.Tensor], layout: str = "hf"
) -> tuple[Any, Any, Any]:
    """Our model, its component and arguments, on the way that a folder of theirs takes."""
    foreign = ForeignModel(config, {}, {name: lazy(w) for name, w in weights.items()}, (), layout)
    component, args = architectures.read_foreign(foreign, REGISTRY, HERE)
    model = architectures.build(component, args)
    tensors = architectures.model_tensors(component, foreign, args, parameters(model))
    assert not mismatches(tensors, parameters(model))
    read = {name: tensor.read() for name, tensor in tensors.items()}
    back = {}
    for entry in architectures.foreign_table(component, layout, args):
        rows = np.arange(read[entry.name].shape[0]) if entry.rows is None else np.array(entry.rows)
        back[entry.foreign] = mx.take(read[entry.name], mx.array(np.argsort(rows)), axis=0)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():  # out again: the identity to the bit
        bits = (back[name].view(mx.uint16), torch.uint16) if weight.dtype == torch.bfloat16 else None
        ours, theirs = (bits[0], weight.view(bits[1])) if bits else (back[name], weight)
        np.testing.assert_array_equal(np.array(ours), theirs.numpy(), err_msg=name)
    model.update(tree_unflatten([(name, value.astype(mx.float32)) for name, value in read.items()]))
    return model, component, args


def close(got: mx.array, want: torch.Tensor) -> None:
    exact = want.numpy()
    assert np.abs(np.array(got) - exact).max() <= 1e-5 * np.abs(exact).max()


def some_ids() -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (2, TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_theirs(name: str, tied: bool, dtype: torch.dtype) -> None:
    """Of the whole text, of one that the cache decodes, and of both spellings of the config."""
    theirs, weights = their_model(FAMILIES[name], tied, dtype)
    ids = some_ids()
    with torch.no_grad():
        want = theirs(ids).logits
    both = both_spellings(theirs, FAMILIES[name], tied)
    model, _, args = opened(both["new"], weights)
    close(model(mx.array(ids.numpy())), want)
    tokens, cache = mx.array(ids.numpy()), model.make_cache()
    parts = [model(tokens[:, :30], cache=cache), model(tokens[:, 30:43], cache=cache)]
    parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(43, TOKENS)]
    close(mx.concatenate(parts, axis=1), want)
    assert opened(both["old"], weights)[2] == args
    assert args.tie_word_embeddings is tied


@pytest.mark.parametrize("name", ["llama", "smollm3", "qwen3"])
def test_a_head_that_is_not_stated_is_there_or_is_the_embedding(name: str) -> None:
    for tied in (False, True):
        theirs, weights = their_model(FAMILIES[name], tied, torch.float32)
        config = both_spellings(theirs, FAMILIES[name], tied)["new"]
        del config["tie_word_embeddings"]
        model, _, args = opened(config, weights)
        assert args.tie_word_embeddings is tied
        with torch.no_grad():
            close(model(mx.array(some_ids().numpy())), theirs(some_ids()).logits)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_what_the_tensors_tell_may_be_left_out(name: str) -> None:
    """The width of a head as null, as configs of transformers before 5 have it."""
    theirs, weights = their_model(FAMILIES[name], False, torch.float32)
    config = both_spellings(theirs, FAMILIES[name], False)["new"]
    args = opened(config, weights)[2]
    assert opened({**config, "head_dim": None, "num_key_value_heads": None}, weights)[2] == args


def test_a_mistral_with_windows_by_layer_is_a_ministral() -> None:
    """As their reader of config.json has it too."""
    theirs, weights = their_model(FAMILIES["ministral"], False, torch.float32)
    config = both_spellings(theirs, FAMILIES["ministral"], False)["new"]
    args = opened(config, weights)[2]
    assert opened({**config, "model_type": "mistral"}, weights)[2] == args
    assert (args.model_type, args.window_layers) == ("mistral", (1, 3))


def test_a_dynamic_scaling_is_none_up_to_the_stated_length() -> None:
    family = {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    theirs, weights = their_model(family, False, torch.float32)
    model, _, args = opened(both_spellings(theirs, family, False)["new"], weights)
    assert (args.rope_scaling, model.context_tokens) == (None, BASE["max_position_embeddings"])
    with torch.no_grad():
        close(model(mx.array(some_ids().numpy())), theirs(some_ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3", "smollm3"])
def test_a_folder_that_they_write_is_one_model_in_shards_or_not(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs, _ = their_model(FAMILIES[name], tied=name in ("qwen3", "smollm3"), dtype=dtype)
    with torch.no_grad():
        want = theirs(some_ids()).logits
    theirs.to(dtype)
    fingerprints = set()
    for folder, largest in ((tmp_path / "single", "1GB"), (tmp_path / "shards", "20KB")):
        theirs.save_pretrained(folder, max_shard_size=largest)
        small_tokenizers.write(folder, small_tokenizers.words(), {}, [0])
        model = loading.load(folder, REGISTRY)
        close(model.language_model(mx.array(some_ids().numpy())), want)
        fingerprints.add(model.fingerprint)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert len(fingerprints) == 1


#: a tensor of theirs -> what llama.cpp calls it
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
}


def as_gguf(
    model: Any, weights: dict[str, torch.Tensor], architecture: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors as llama.cpp's converter makes them of a model of theirs."""
    config = model.config
    width = model.model.layers[0].self_attn.head_dim
    kv = config.num_key_value_heads
    rope = config.rope_parameters
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(np.float32(config.rms_norm_eps)),
        "rope.freq_base": rope["rope_theta"],
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    raw = {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in keys.items()}
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** (-np.arange(0, width, 2) / width)
        divisors = plain / model.model.rotary_emb.inv_freq.numpy()
        raw["rope_freqs.weight"] = divisors.astype(np.float32).tolist()
    found = {}
    for name, weight in weights.items():
        if architecture in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            heads = kv if "k_proj" in name else config.num_attention_heads
            weight = weight.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2).contiguous()
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = weight
    return raw, found


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize(
    "name", ["llama", "llama with biases", "llama3", "linear", "smollm3", "qwen2", "yarn", "qwen3"]
)
def test_the_same_as_gguf_is_the_same_model(name: str, tied: bool) -> None:
    theirs, weights = their_model(FAMILIES[name], tied, torch.float32)
    raw, tensors = as_gguf(theirs, weights, FAMILIES[name]["model_type"])
    model, _, args = opened(raw, tensors, "gguf")
    with torch.no_grad():
        close(model(mx.array(some_ids().numpy())), theirs(some_ids()).logits)
    assert (args.rope_scaling == "divisors") == (name == "llama3")
