"""Tiny random models that transformers makes of Phi-3 and OLMo 2 compute here what they do there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_unflatten
from theirs import random_model, spellings

from mlxlora_core import plugins
from mlxlora_core.api import ForeignModel, LazyTensor
from mlxlora_core.files.tensor_checks import mismatches
from mlxlora_core.model import architectures
from mlxlora_core.model.generate import decode
from mlxlora_core.model.linears import parameters
from mlxlora_core.testing.layouts import stored

transformers: Any = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'mlxlora[interop]'"
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")
REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
HERE = Path("a checkpoint")
TOKENS = 70  # more than any window and any original length below but one
BASE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
FACTORS = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.5, 3.0, 6.0, 12.0]}
LONGROPE = {"type": "longrope", **FACTORS}
PARTLY = {"type": "longrope", "short_factor": [1.0, 1.1, 1.5], "long_factor": [1.5, 3.0, 6.0]}
#: in the spelling of transformers before 5
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"model_type": "phi3", "rope_theta": 10000.0},
    "phi3 with a window": {"model_type": "phi3", "sliding_window": 7},
    "phi3, part of a head": {"model_type": "phi3", "partial_rotary_factor": 0.75},
    "phi3, as many key heads": {"model_type": "phi3", "num_key_value_heads": 6, "head_dim": 10},
    "longrope, short": {
        "model_type": "phi3",
        "original_max_position_embeddings": TOKENS,
        "rope_scaling": LONGROPE,
    },
    "longrope, long": {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        "rope_scaling": LONGROPE,
    },
    "all of phi3": {
        "model_type": "phi3",
        "original_max_position_embeddings": TOKENS - 1,
        "partial_rotary_factor": 0.75,
        "sliding_window": 9,
        "rope_scaling": PARTLY,
    },
    "olmo2": {"model_type": "olmo2", "rope_theta": 5e5},
    "olmo2 with biases": {"model_type": "olmo2", "attention_bias": True, "num_key_value_heads": 6},
    "olmo2, heads of their own width": {"model_type": "olmo2", "head_dim": 10},
}
LONG = ("longrope, long", "all of phi3")


def their_model(
    family: dict[str, Any], tied: bool, dtype: torch.dtype
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of theirs in float64, and its weights in ``dtype``, the same numbers."""
    made = transformers.AutoConfig.for_model(**json.loads(json.dumps({**BASE, **family})))
    made.tie_word_embeddings = tied
    return random_model(transformers, made, dtype)


def both_spellings(model: Any, family: dict[str, Any], tied: bool) -> dict[str, dict[str, Any]]:
    """config.json in the new spelling and in the old one."""
    stated = {"rope_theta": BASE["rope_theta"], **family, "tie_word_embeddings": tied}
    return spellings(model, stated, ["rope_parameters"])


def bits(weight: torch.Tensor) -> np.ndarray:
    """What a weight is stored as."""
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()


def lazy(array: np.ndarray) -> LazyTensor:
    """A tensor of float32, or of bfloat16 where it is given as whole numbers."""
    half = array.dtype == np.uint16
    value = mx.array(array).view(mx.bfloat16) if half else mx.array(array)
    return LazyTensor(array.shape, "bfloat16" if half else "float32", lambda: value)


def opened(
    config: dict[str, Any], weights: dict[str, np.ndarray], layout: str = "hf"
) -> tuple[Any, Any, Any]:
    """Our model, its arguments and its parameters as stored, on the way that a folder of theirs takes."""
    foreign = ForeignModel(config, {}, {name: lazy(w) for name, w in weights.items()}, (), layout)
    component, args = architectures.read_foreign(foreign, REGISTRY, HERE)
    model = architectures.build(component, args)
    tensors = architectures.model_tensors(component, foreign, args, parameters(model))
    assert not mismatches(tensors, parameters(model))
    read = {name: tensor.read() for name, tensor in tensors.items()}
    ours = {n: np.array(w.view(mx.uint16) if w.dtype == mx.bfloat16 else w) for n, w in read.items()}
    back = stored(architectures.foreign_table(component, layout, args), ours)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():  # out again: the identity to the bit
        np.testing.assert_array_equal(back[name], weight, err_msg=name)
    model.update(tree_unflatten([(name, value.astype(mx.float32)) for name, value in read.items()]))
    return model, args, ours


def close(got: mx.array, want: torch.Tensor) -> None:
    exact = want.numpy()
    assert np.abs(np.array(got) - exact).max() <= 1e-5 * np.abs(exact).max()


def some_ids() -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (2, TOKENS), generator=torch.Generator().manual_seed(1))


def their_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_theirs(name: str, tied: bool, dtype: torch.dtype) -> None:
    """Of the whole text, of one that the cache decodes, and of both spellings of the config."""
    theirs, weights = their_model(FAMILIES[name], tied, dtype)
    raw = {key: bits(weight) for key, weight in weights.items()}
    ids = some_ids()
    want = their_logits(theirs, ids)
    both = both_spellings(theirs, FAMILIES[name], tied)
    model, args, _ = opened(both["new"], raw)
    tokens = mx.array(ids.numpy())
    close(model(tokens), want)
    cache = model.make_cache()
    parts = [model(tokens[:, :30], cache=cache), model(tokens[:, 30:43], cache=cache)]
    parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(43, TOKENS)]
    if name in LONG:
        close(parts[-1][:, -1], want[:, -1])
    else:
        close(mx.concatenate(parts, axis=1), want)
    assert opened(both["old"], raw)[1] == args
    assert args.tie_word_embeddings is tied


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("first", [1, 16, 30])
def test_a_text_that_grows_beyond_the_original_length_is_read_again(first: int, cut: int) -> None:
    """After each part, logits of its tokens are those of the text so far, whole; the layers may be cut."""
    family = {**FAMILIES["longrope, long"], "sliding_window": 12}
    theirs, weights = their_model(family, False, torch.float32)
    raw = {key: bits(weight) for key, weight in weights.items()}
    model, *_ = opened(both_spellings(theirs, family, False)["new"], raw)
    ids, cache, start = some_ids(), model.make_cache(), 0
    for length in (first, 4, 1, 1, 1, 10, 1, 1):
        part = model.embed(mx.array(ids[:, start : start + length].numpy()))
        low = model.run(part, last=cut, cache=cache)
        got = model.head(model.run(low, first=cut, cache=cache))
        close(got, their_logits(theirs, ids[:, : start + length])[:, start:])
        start += length


@pytest.mark.parametrize("name", ["longrope, long", "all of phi3", "olmo2"])
def test_what_is_generated_is_theirs(name: str) -> None:
    """Token for token, from before the original length to far beyond it; they drop their cache there."""
    theirs, weights = their_model(FAMILIES[name], False, torch.float32)
    raw = {key: bits(weight) for key, weight in weights.items()}
    model, *_ = opened(both_spellings(theirs, FAMILIES[name], False)["new"], raw)
    original = FAMILIES[name].get("original_max_position_embeddings", 16)
    prompt = some_ids()[:1, : original - 3]
    settings = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    want = made[0, prompt.shape[1] :].tolist()
    got = decode(model, prompt[0].tolist(), lambda logits, _: int(logits.argmax()), num_tokens=25, stops=())
    assert list(got) == want


def gguf_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes of a config.json."""
    heads, rope = config["num_attention_heads"], config["rope_parameters"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1)),
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config["vocab_size"],
    }
    if config.get("head_dim"):
        keys |= {"attention.key_length": width, "attention.value_length": width}
    kind = config["model_type"]
    found: dict[str, Any] = {"general.architecture": kind, "general.file_type": 0}
    if kind == "phi3":
        original = config["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = original
        keys["attention.sliding_window"] = config["sliding_window"] or 0
        if rope["rope_type"] == "longrope":
            growth = config["max_position_embeddings"] / original
            keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(growth) / math.log(original))
            found["rope_factors_long.weight"] = rope["long_factor"]
            found["rope_factors_short.weight"] = rope["short_factor"]
    return found | {f"{kind}.{key}": value for key, value in keys.items()}


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_of_it_is_the_same_model(name: str, tied: bool) -> None:
    theirs, weights = their_model(FAMILIES[name], tied, torch.float32)
    config = both_spellings(theirs, FAMILIES[name], tied)["new"]
    _, args, ours = opened(config, {key: bits(weight) for key, weight in weights.items()})
    spec = next(c.spec for c in REGISTRY.of("architecture") if c.spec.name == config["model_type"])
    raw = stored(spec.layouts["gguf"].table(args), ours)
    model, again, same = opened(gguf_keys(config), raw, "gguf")
    assert again == args
    assert all(np.array_equal(same[key], array) for key, array in ours.items()) and same.keys() == ours.keys()
    close(model(mx.array(some_ids().numpy())), their_logits(theirs, some_ids()))
