"""Hugging Face folders: what is read of them, and what is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_folder
import mlx.core as mx
import pytest
from hf_folder import CONFIG, dense, save, write, write_json, write_shards
from mlxlora_hf import detect, open_folder

from mlxlora_core.api import ForeignModel, MlxloraError, ModelError, NoOptions, SafetyError

Change = Callable[[Path], object]


def opened(folder: Path) -> ForeignModel:
    assert detect(folder)
    return open_folder(folder, NoOptions())


def refused(folder: Path, kind: type[MlxloraError] = ModelError) -> str:
    assert detect(folder)
    with pytest.raises(kind) as caught:
        for tensor in open_folder(folder, NoOptions()).tensors.values():
            tensor.read()
    line = str(caught.value)
    assert "\n" not in line and str(folder) in caught.value.where
    return line


def same(model: ForeignModel, want: dict[str, mx.array]) -> None:
    assert sorted(model.tensors) == sorted(want)
    for name, lazy in model.tensors.items():
        got = lazy.read()
        assert got.dtype == want[name].dtype and got.shape == want[name].shape == lazy.shape
        word = getattr(mx, f"uint{8 * got.dtype.size}")
        assert mx.array_equal(got.view(word), want[name].view(word)).item(), name


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_every_tensor_is_read_to_the_bit(tmp_path: Path, dtype: mx.Dtype, shards: int) -> None:
    want = dense(dtype)
    # A NaN, an infinity and the smallest number there is come through too.
    odd = mx.array([0x7FC1, 0xFF80, 0x0001, 0x8000], mx.uint16).view(mx.bfloat16)
    want |= {"odd": odd, "none": mx.zeros((0, 3), dtype)}
    folder = write_shards(tmp_path, want, shards) if shards else write(tmp_path, want)
    model = opened(folder)
    same(model, want)
    assert (model.layout, model.config["model_type"], list(model.notes)) == ("hf", "llama", [])


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    tensors = dict(reversed(dense().items()))
    assert list(opened(write_shards(tmp_path, tensors, 2)).tensors) == list(tensors)


def test_only_files_of_the_index_are_read(tmp_path: Path) -> None:
    want = dense()
    folder = write_shards(tmp_path, want)
    save(folder / "model-00001-of-00009.safetensors", dense(seed=1))
    save(folder / "consolidated.safetensors", {"tok_embeddings.weight": mx.ones((2, 2))})
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    for name in ("original", "onnx"):
        (folder / name).mkdir()
    same(opened(folder), want)


def test_an_index_of_the_one_file_is_as_good_as_none(tmp_path: Path) -> None:
    want = dense()
    folder = write(tmp_path, want)
    table = dict.fromkeys(want, "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": table})
    same(opened(folder), want)


def test_what_the_index_does_not_name_is_left_out_and_told(tmp_path: Path) -> None:
    want = dense()
    folder = write_shards(tmp_path, want | {"model.stray.weight": mx.ones(2)})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.stray.weight"]
    write_json(folder / "model.safetensors.index.json", index)
    model = opened(folder)
    same(model, want)
    assert any("model.stray.weight" in note for note in model.notes)


def index_of(folder: Path, **changed: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changed.pop("weight_map", {})
    write_json(path, index | changed)


@pytest.mark.parametrize(
    ("change", "words", "kind"),
    [
        (
            lambda f: index_of(f, weight_map={"model.extra": "model-00001-of-00002.safetensors"}),
            ["model.extra in"],
            ModelError,
        ),
        (
            lambda f: index_of(f, weight_map={"x": "model-00003-of-00002.safetensors"}),
            ["lacks 1 of 3 shards"],
            ModelError,
        ),
        (
            lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
            ["lacks 1 of 2 shards", "00002-of"],
            ModelError,
        ),
        (
            lambda f: index_of(f, weight_map={"x": "../model.safetensors"}),
            ["outside its folder"],
            SafetyError,
        ),
        (lambda f: index_of(f, weight_map={"x": "/etc/passwd"}), ["outside its folder"], SafetyError),
        (lambda f: index_of(f, weight_map={"x": 3}), ["is no index of shards"], ModelError),
        (lambda f: write_json(f / "model.safetensors.index.json", []), ["is no index of shards"], ModelError),
        (
            lambda f: write_json(f / "model.safetensors.index.json", {"weight_map": {}}),
            ["is no index"],
            ModelError,
        ),
        (lambda f: index_of(f, weight_map={"x": "tokenizer.json"}), ["wanted .safetensors"], ModelError),
        (lambda f: save(f / "model.safetensors", dense()), ["both model.safetensors and"], ModelError),
        (lambda f: os.truncate(f / "model-00001-of-00002.safetensors", 2000), ["bytes"], ModelError),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}'),
            ["a there twice"],
            ModelError,
        ),
        (
            lambda f: (f / "model-00001-of-00002.safetensors").write_text(
                "version https://git-lfs.github.com"
            ),
            ["Git LFS pointer"],
            ModelError,
        ),
    ],
)
def test_an_index_that_lies(
    tmp_path: Path, change: Change, words: list[str], kind: type[MlxloraError]
) -> None:
    change(write_shards(tmp_path))
    line = refused(tmp_path, kind)
    assert all(word in line for word in words), line


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "outside its folder" in refused(folder, SafetyError)


def test_the_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    want = dense()
    write_shards(snapshot, want)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / ".." / "blobs" / str(number))
    same(opened(snapshot), want)


def test_a_file_that_is_replaced_meanwhile_is_not_read(tmp_path: Path) -> None:
    model = opened(write(tmp_path))
    save(tmp_path / "other", dense(seed=1))
    os.replace(tmp_path / "other", tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="changed while it was read"):
        model.tensors["lm_head.weight"].read()


# --- names --------------------------------------------------------------------


def test_buffers_that_are_computed_are_dropped_without_a_word(tmp_path: Path) -> None:
    want = dense()
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(8),
        "model.rotary_emb.inv_freq": mx.ones(8),
        "model.layers.0.attn.masked_bias": mx.ones(1),
        "model.layers.0.attn.bias": mx.ones((1, 1, 4, 4)),
        "model.layers.0.attention.bias": mx.ones((1, 1, 4, 4)),
    }
    kept = {"model.layers.0.self_attn.q_proj.bias": mx.ones(64)}
    model = opened(write(tmp_path, want | buffers | kept))
    same(model, want | kept)
    assert not model.notes


PREFIXES = {
    "language_model.": lambda name: f"language_model.{name}",
    "model.language_model.": lambda name: name.replace("model.", "model.language_model.", 1),
    "model.text_model.": lambda name: name.replace("model.", "model.text_model.", 1),
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "put in front": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("told", PREFIXES)
def test_what_stands_in_front_of_the_names_is_taken_off_and_told(tmp_path: Path, told: str) -> None:
    want = dense()
    model = opened(write(tmp_path, {PREFIXES[told](name): tensor for name, tensor in want.items()}))
    same(model, want)
    assert told in "; ".join(model.notes)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    tensors = {PREFIXES["module."](name): tensor for name, tensor in dense().items()}
    assert "lm_head.weight" in refused(write(tmp_path, tensors | {"lm_head.weight": mx.ones(2)}))


WRAPPER = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "tie_word_embeddings": False,
    "text_config": {k: v for k, v in CONFIG.items() if k not in ("tie_word_embeddings", "architectures")},
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 8},
}


def test_the_text_model_of_a_model_that_sees(tmp_path: Path) -> None:
    want = dense()
    seen = {"model.vision_tower.a.weight": mx.ones(3), "model.vision_tower.b.weight": mx.ones(3)}
    seen |= {"model.multi_modal_projector.weight": mx.ones(3)}
    named = {PREFIXES["model.language_model."](name): tensor for name, tensor in want.items()}
    model = opened(write(tmp_path, named | seen, WRAPPER))
    same(model, want)
    assert model.config == {**WRAPPER["text_config"], "tie_word_embeddings": False}
    told = "; ".join(model.notes)
    assert "'gemma3'" in told and "model.vision_tower (2)" in told and "3 tensors" in told
    ends = json.loads(model.tokenizer["generation_config.json"])
    assert ends["eos_token_id"] == [1, 106, 2]


# --- refusals -----------------------------------------------------------------


def config_of(folder: Path, **changed: Any) -> None:
    write_json(folder / "config.json", CONFIG | changed)


@pytest.mark.parametrize(
    "method",
    [
        "gptq",
        "awq",
        "bitsandbytes",
        "fp8",
        "compressed-tensors",
        "mxfp4",
        "hqq",
        "quanto",
        "aqlm",
        "torchao",
        "modelopt",
    ],
)
def test_another_way_to_quantize_is_refused_by_name(tmp_path: Path, method: str) -> None:
    config_of(write(tmp_path), quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    line = refused(tmp_path)
    assert f"is quantized by {method}, which is not read; bf16, f16 and f32 weights are read" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: config_of(f, quantization_config={"kv_cache": 1}), "does not name"),
        (lambda f: config_of(f, quantization_config=[1]), "quantization_config is a list"),
        (lambda f: config_of(f, text_config=[]), "text_config is a list"),
        (
            lambda f: config_of(f, text_config={"hidden_size": 3}),
            "'llama' model, whose text_config does not state",
        ),
        (
            lambda f: write_json(
                f / "config.json", {"model_type": "deepseek_vl", "architectures": [], "language_config": {}}
            ),
            "'deepseek_vl' model, with a text model under language_config",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json:1:2: is no JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": 1, "model_type": 2}'), "there twice"),
        (lambda f: write_json(f / "config.json", []), "holds a list, wanted an object"),
        (lambda f: config_of(f, eos_token_id="</s>"), "eos_token_id of config.json is </s>"),
        (lambda f: config_of(f, eos_token_id=[2, -1]), "eos_token_id of config.json is [2, -1]"),
        (lambda f: config_of(f, eos_token_id=[True]), "wanted an id"),
        (lambda f: (f / "tokenizer.json").unlink(), "there is no tokenizer: read are tokenizer.json"),
        (
            lambda f: ((f / "tokenizer.json").rename(f / "vocab.json"), (f / "merges.txt").touch()),
            "save_pretrained",
        ),
        (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json: holds a list"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "has pytorch_model.bin, which are pickles and can hold code; read are model.safetensors",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
            "but no index of them",
        ),
        (lambda f: (f / "model.safetensors").rename(f / "a.gguf"), "name the .gguf file"),
        (lambda f: (f / "model.safetensors").rename(f / "tf_model.h5"), "TensorFlow"),
        (lambda f: (f / "model.safetensors").unlink(), "there are no weights"),
        (lambda f: (f / "model.safetensors").write_text("<!doctype html>"), "is a web page"),
    ],
)
def test_what_is_refused_says_what_would_be_read(tmp_path: Path, change: Change, words: str) -> None:
    change(write(tmp_path))
    assert words in refused(tmp_path)


def test_a_file_of_code_is_refused(tmp_path: Path) -> None:
    config_of(write(tmp_path), model_file="modeling.py")
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    assert "model_file" in refused(tmp_path, SafetyError)
    assert not (tmp_path / "canary").exists()


def test_a_pointer_at_code_is_told_and_not_followed(tmp_path: Path) -> None:
    config_of(write(tmp_path), auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, model_type="phi3")
    (tmp_path / "configuration_phi3.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    model = opened(tmp_path)
    assert "auto_map" not in model.config and any("AutoConfig" in note for note in model.notes)
    assert not (tmp_path / "canary").exists()


# --- tokenizers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["tokenizer.json", "tokenizer.model", "tekken.json"], ["tokenizer.json"]),
        (["tokenizer.model"], ["tokenizer.model"]),
        (["tekken.json"], ["tekken.json"]),
        (
            ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "README.md"],
            ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
        ),
        (
            ["tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.json"],
            ["tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.json"],
        ),
    ],
)
def test_the_files_of_the_tokenizer(tmp_path: Path, there: list[str], taken: list[str]) -> None:
    (write(tmp_path) / "tokenizer.json").unlink()
    config_of(tmp_path, eos_token_id=None)
    for name in there:
        (tmp_path / name).write_text("{}")
    assert opened(tmp_path).tokenizer == {name: tmp_path / name for name in taken}


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        (2, None, [2]),
        ([2, 5], {"eos_token_id": 7, "temperature": 0.5}, [7, 2, 5]),
        (2, {"eos_token_id": [2, 9]}, None),
        (None, {"eos_token_id": 2}, None),
        (None, None, None),
    ],
)
def test_every_end_id_stands_in_the_generation_config(
    tmp_path: Path, config: Any, generation: dict[str, Any] | None, want: list[int] | None
) -> None:
    config_of(write(tmp_path), eos_token_id=config)
    path = tmp_path / "generation_config.json"
    if generation is not None:
        write_json(path, generation)
    given = opened(tmp_path).tokenizer.get("generation_config.json")
    if want is None:
        assert given == (path if generation is not None else None)
    else:
        assert isinstance(given, bytes) and json.loads(given) == {**(generation or {}), "eos_token_id": want}


# --- whose folder -------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "known"),
    [
        ({"config.json": CONFIG, "model.safetensors": None}, True),
        ({"config.json": CONFIG, "pytorch_model.bin": None}, True),
        ({"config.json": CONFIG}, True),
        (
            {
                "config.json": {"tokenizer_files": ["tokenizer.json"], "dim": 8, "hidden_size": 8},
                "model.safetensors": None,
            },
            False,
        ),
        ({"config.json": {"model_type": "llama", "dim": 8, "n_layers": 1}, "model.safetensors": None}, False),
        ({"params.json": hf_folder.PARAMS, "consolidated.00.pth": None}, False),
        ({"params.json": hf_folder.PARAMS, "consolidated.00.pth": None, "config.json": CONFIG}, False),
        ({"params.json": hf_folder.PARAMS, "consolidated.safetensors": None}, True),
        (
            {
                "params.json": hf_folder.PARAMS,
                "consolidated.safetensors.index.json": None,
                "config.json": CONFIG,
            },
            True,
        ),
        ({"model.safetensors": None}, False),
        ({"config.json": None}, False),
        ({}, False),
    ],
)
def test_whose_folder_it_is(tmp_path: Path, files: dict[str, Any], known: bool) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text("{" if content is None else json.dumps(content))
    assert detect(tmp_path) is known
