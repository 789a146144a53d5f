"""Folders that transformers and mlx-lm themselves write: every tensor, and what is computed of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlxlora_hf import detect, open_folder

from mlxlora_core import plugins
from mlxlora_core.api import ModelError, NoOptions
from mlxlora_core.model import loading
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of

transformers: Any = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'mlxlora[interop]'"
)
REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
TEXT_IDS = [5, 17, 230, 4, 99, 200, 31, 8, 140, 77]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {"rope_theta": 5e5, "tie_word_embeddings": False},
    "llama tied": {"rope_theta": 1e5, "tie_word_embeddings": True},
    "qwen2": {"rope_theta": 1e6, "tie_word_embeddings": False},
    "mistral": {"rope_theta": 1e4, "sliding_window": None, "tie_word_embeddings": False},
}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a layer scales the weights"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def make(folder: Path, family: str, dtype: torch.dtype, shard_size: str = "5GB") -> Any:
    """A tiny random model of transformers, saved as it saves."""
    torch.manual_seed(3)
    kind, settings = family.split()[0], FAMILIES[family]
    config = transformers.AutoConfig.for_model(kind, **SIZES, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, and biases, which are all ones or zeros else
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder)
    path = folder / "config.json"
    stated = json.loads(path.read_text())  # mlx-lm looks for the base at the top alone, and takes 10000 else
    path.write_text(json.dumps(stated | {"rope_theta": settings["rope_theta"]}))
    return model


def logits(folder: Path) -> np.ndarray:
    model = loading.load(folder, REGISTRY)
    return np.array(model.language_model(mx.array([TEXT_IDS])).astype(mx.float32))[0]


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """How far apart, relative to the largest."""
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves(tmp_path: Path, family: str, dtype: torch.dtype, shards: str) -> None:
    theirs = make(tmp_path, family, dtype, "100KB" if shards == "shards" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() is (shards == "shards")
    assert detect(tmp_path)
    opened = open_folder(tmp_path, NoOptions())
    want = {n: t for n, t in theirs.state_dict().items() if n in opened.tensors or "lm_head" not in n}
    assert sorted(opened.tensors) == sorted(want)
    for name, lazy in opened.tensors.items():
        bits = want[name].contiguous().view(torch.int16 if dtype == torch.bfloat16 else torch.int32).numpy()
        got = lazy.read().view(mx.int16 if dtype == torch.bfloat16 else mx.int32)
        assert np.array_equal(np.array(got), bits), name
    # In float64 there, of the numbers that are stored; a cast would round the rotary frequencies too.
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        exact = reloaded(torch.tensor([TEXT_IDS])).logits[0].numpy()
    assert apart(logits(tmp_path), exact) < 1e-5


# --- mlx-lm -------------------------------------------------------------------

MIXED = {
    "model.embed_tokens": {"group_size": 64, "bits": 8},
    "model.layers.0.self_attn.v_proj": {"group_size": 32, "bits": 6},
    "model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 5},
    "model.layers.1.mlp.up_proj": {"group_size": 32, "bits": 3},
    "model.layers.1.self_attn.o_proj": False,
}


def quantized(source: Path, target: Path, *, mixed: bool, bits: int = 4) -> Any:
    """What mlx-lm makes of a folder, and the model as mlx-lm loads it again."""
    utils: Any = pytest.importorskip("mlx_lm.utils", reason="needs mlx-lm: pip install --no-deps mlx-lm")
    model, config = utils.load_model(source, lazy=True)
    choose = (lambda path, module: MIXED.get(path, True)) if mixed else None
    model, config = utils.quantize_model(model, config, 32, bits, quant_predicate=choose)
    target.mkdir()
    utils.save_model(target, model)
    utils.save_config(config, target / "config.json")
    write_tokenizer(target)
    again, _ = utils.load_model(target)
    return again


def expanded(module: nn.Module) -> mx.array:
    """The weight of a layer of mlx-lm's, in float32."""
    if not hasattr(module, "scales"):
        return module.weight
    scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
    return mx.dequantize(module.weight, scales, biases, module.group_size, module.bits)


@pytest.mark.parametrize("mixed", [False, True], ids=["of a kind", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_mlx_lm_quantizes(tmp_path: Path, family: str, dtype: torch.dtype, mixed: bool) -> None:
    make(tmp_path / "hf", family, dtype)
    theirs = quantized(tmp_path / "hf", tmp_path / "mlx", mixed=mixed)
    opened = open_folder(tmp_path / "mlx", NoOptions())
    modules = dict(theirs.named_modules())
    packed = 0
    for name, lazy in opened.tensors.items():
        path, _, part = name.rpartition(".")
        module = modules[path]
        want = expanded(module) if part == "weight" else module[part]
        got = lazy.read()
        assert got.dtype == want.dtype and mx.array_equal(got, want).item(), name
        if part == "weight" and hasattr(module, "scales"):
            packed += 1
            assert lazy.packed is not None
            assert lazy.packed.options == {"group_size": module.group_size, "bits": module.bits}, name
            for key, tensor in lazy.packed.parts.items():
                assert mx.array_equal(tensor.read(), module[key]).item(), (name, key)
    assert packed == sum(hasattr(module, "scales") for module in modules.values()) > 10
    theirs.set_dtype(mx.float32)
    want = np.array(theirs(mx.array([TEXT_IDS])))[0]
    assert apart(logits(tmp_path / "mlx"), want) < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_number_of_bits(tmp_path: Path, bits: int) -> None:
    make(tmp_path / "hf", "llama", torch.bfloat16)
    theirs = quantized(tmp_path / "hf", tmp_path / "mlx", mixed=False, bits=bits)
    theirs.set_dtype(mx.float32)
    assert apart(logits(tmp_path / "mlx"), np.array(theirs(mx.array([TEXT_IDS])))[0]) < 1e-5


def test_several_chat_templates_as_transformers_saves_them(tmp_path: Path) -> None:
    make(tmp_path, "llama", torch.float32)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>", bos_token="<s>"
    )
    theirs.chat_template = {
        "default": "plain {{ messages[0].content }}{{ eos_token }}",
        "tool_use": "{{ tools[0].function.name }}, {{ messages[0].content }}{{ eos_token }}",
        "rag": "{{ documents }}",
    }
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    said = [{"role": "user", "content": "the layer"}]
    tools = [{"type": "function", "function": {"name": "scales"}}]
    convert_to = tmp_path / "converted"
    result_of(convert(tmp_path, convert_to, REGISTRY))
    for folder in (tmp_path, convert_to):
        tokenizer = loading.load(folder, REGISTRY).tokenizer
        for given in ([], tools):
            want = theirs.apply_chat_template(said, tools=given or None, return_dict=False)
            got = [i for piece in tokenizer.render(said, given) for i in piece.ids]
            assert got == want
            assert ("scales" in tokenizer.decode(got)) is bool(given)


#: name of a tensor that the config does not tell of -> its shape, and whether the model is refused
BESIDE: dict[str, tuple[tuple[int, ...], bool]] = {
    "model.layers.0.self_attn.q_proj.bias": ((128,), True),
    "model.layers.1.self_attn.q_norm.weight": ((32,), True),
    "lm_head.bias": ((300,), True),
    "model.layers.2.mlp.up_proj.weight": ((192, 128), False),
    "score.weight": ((3, 128), False),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_tensor_that_the_config_does_not_tell_of(tmp_path: Path, name: str) -> None:
    """mlx-lm refuses it; transformers warns, and computes without it."""
    import mlx_lm.utils
    from safetensors.torch import load_file, save_file

    shape, refused = BESIDE[name]
    theirs = make(tmp_path, "llama", torch.float32)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(shape)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="parameters not in model"):
        mlx_lm.utils.load_model(tmp_path)
    if refused:
        with pytest.raises(ModelError, match=f"1 tensors have no place .*: {name}. Fix: check the config"):
            loading.load(tmp_path, REGISTRY)
        return
    assert loading.load(tmp_path, REGISTRY).notes == (f"left out, the model has no use for it: {name}",)
    with torch.no_grad():
        want = theirs(torch.tensor([TEXT_IDS])).logits[0].numpy()
    assert apart(logits(tmp_path), want) < 1e-5


@pytest.mark.parametrize("kind", ["hf", "mlx"])
def test_a_converted_folder_is_the_same_base(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "hf", "llama", torch.bfloat16)
    quantized(tmp_path / "hf", tmp_path / "mlx", mixed=True)
    report = result_of(convert(tmp_path / kind, tmp_path / "ours", REGISTRY, name="org/model@c0ffee"))
    assert not report.left_out
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text())["eos_token_id"] in (2, [2])
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["source"] == "org/model@c0ffee"
    first, second = (loading.load(tmp_path / name, REGISTRY) for name in (kind, "ours"))
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(logits(tmp_path / kind), logits(tmp_path / "ours"))
