"""Tiny random models that transformers makes of Gemma 2 and Gemma 3 compute here what they do there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_unflatten
from theirs import random_model, spellings

import mlxlora_core as mlxlora
from mlxlora_core import plugins
from mlxlora_core.api import ForeignModel, LazyTensor
from mlxlora_core.files.tensor_checks import mismatches
from mlxlora_core.model import architectures
from mlxlora_core.model.linears import parameters

transformers: Any = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'mlxlora[interop]'"
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")
REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
HERE = Path("a checkpoint")
TOKENS = 70  # more than any window below
BASE = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "query_pre_attn_scalar": 17,
    "sliding_window": 9,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
#: in the spelling of transformers before 5
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"model_type": "gemma2", "rope_theta": 10000.0},
    "gemma2 with low caps": {
        "model_type": "gemma2",
        "rope_theta": 500.0,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 0.7,
    },
    "gemma2 without caps": {
        "model_type": "gemma2",
        "rope_theta": 10000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma2, scaled, all layers full": {
        "model_type": "gemma2",
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "layer_types": ["full_attention"] * 4,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        "num_hidden_layers": 7,
    },
    "gemma3, every second layer full": {
        "model_type": "gemma3_text",
        "rope_theta": 2e3,
        "rope_local_base_freq": 30.0,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 0.8,
    },
    "gemma3, scaled": {
        "model_type": "gemma3_text",
        "rope_theta": 1e3,
        "rope_local_base_freq": 1e2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 64,
    },
}


def drawn(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Weights, larger for queries and keys; those of norms lie around 0, to which theirs add 1."""
    large = 2.4 if "q_proj" in name or "k_proj" in name else 0.9
    return noise * large / noise.shape[-1] ** 0.5 if noise.ndim > 1 else 0.3 * noise


def their_model(
    family: dict[str, Any], tied: bool, dtype: torch.dtype
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of theirs in float64, and its weights in ``dtype``, the same numbers."""
    made = transformers.AutoConfig.for_model(**{**BASE, **family, "tie_word_embeddings": tied})
    model, weights = random_model(transformers, made, dtype, drawn)
    scale = torch.tensor(BASE["hidden_size"] ** 0.5, dtype=torch.float64)
    model.model.embed_tokens.embed_scale = scale  # theirs is of float32, whatever the model's type
    return model, weights


def both_spellings(model: Any, family: dict[str, Any], tied: bool) -> dict[str, dict[str, Any]]:
    """config.json in the new spelling and in the old one."""
    stated = {**family, "tie_word_embeddings": tied}
    return spellings(model, stated, ["rope_parameters", "layer_types"])


def opened(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    """Our model, its component and arguments, on the way that a folder of theirs takes."""

    def lazy(weight: torch.Tensor) -> LazyTensor:
        dtype = str(weight.dtype).removeprefix("torch.")
        half = weight.dtype == torch.bfloat16
        array = mx.array(weight.view(torch.uint16).numpy()).view(mx.bfloat16) if half else weight.numpy()
        return LazyTensor(tuple(weight.shape), dtype, lambda: mx.array(array))

    foreign = ForeignModel(config, {}, {name: lazy(w) for name, w in weights.items()}, (), "hf")
    component, args = architectures.read_foreign(foreign, REGISTRY, HERE)
    model = architectures.build(component, args)
    tensors = architectures.model_tensors(component, foreign, args, parameters(model))
    assert not mismatches(tensors, parameters(model))
    read = {name: tensor.read() for name, tensor in tensors.items()}
    back = {}
    for entry in architectures.foreign_table(component, "hf", args):
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
    far = np.abs(np.array(got) - exact).max()
    assert far <= 1e-5 * np.abs(exact).max(), far / np.abs(exact).max()


def some_ids(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (2, tokens), generator=torch.Generator().manual_seed(1))


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
    close(model(mx.array(ids[:, :5].numpy())), want[:, :5])  # less than any window
    tokens, cache = mx.array(ids.numpy()), model.make_cache()
    parts = [model(tokens[:, :30], cache=cache), model(tokens[:, 30:43], cache=cache)]
    parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(43, TOKENS)]
    close(mx.concatenate(parts, axis=1), want)
    assert opened(both["old"], weights)[2] == args
    assert args.tie_word_embeddings is tied


def test_embeddings_in_bfloat16_are_theirs_to_the_bit() -> None:
    """Their factor is the root of the width, 6.9282, as bfloat16 has it: 6.9375."""
    made = transformers.AutoConfig.for_model(**{**BASE, **FAMILIES["gemma3"]})
    theirs = transformers.AutoModelForCausalLM.from_config(made).bfloat16()
    weights = {name: w for name, w in theirs.state_dict().items() if name != "lm_head.weight"}
    model, _, _ = opened(json.loads(json.dumps(made.to_dict())), weights)
    model.tok_embeddings.weight = model.tok_embeddings.weight.astype(mx.bfloat16)
    ids = some_ids()
    with torch.no_grad():
        want = theirs.model.embed_tokens(ids)
    got = model.embed(mx.array(ids.numpy()))
    assert got.dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(got.view(mx.uint16)), want.view(torch.uint16).numpy())


def test_a_real_gemma_3_has_the_loss_and_the_text_of_transformers(gemma3: Path) -> None:
    """That of its Q4_K_M in float32; theirs is told to 8 digits."""
    opened = mlxlora.load(str(gemma3)).base
    losses = {
        "The capital of France is Paris, and the capital of Germany is Berlin.": 2.2143874,
        "Gravity is the force that keeps the planets in orbit around the sun.": 2.1747537,
    }
    for text, want in losses.items():
        ids = opened.tokenizer.encode(text, bos=True)
        logits = np.array(opened.module(mx.array([ids]))[0, :-1].astype(mx.float32)).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        loss = (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]).mean()
        assert loss == pytest.approx(want, abs=5e-5)
    prompt, cache = [2, 818, 5279, 529, 7001, 563], opened.module.make_cache()
    assert opened.tokenizer.encode("The capital of France is", bos=True) == prompt
    drawn = []
    for _ in range(15):
        logits = opened.module(mx.array([drawn[-1:] or prompt]), cache=cache)
        drawn.append(int(logits[0, -1].argmax()))
    assert drawn == [506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506, 7488, 3207, 528, 7001]
