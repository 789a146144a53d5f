"""Mistral's own folders: params.json and consolidated.safetensors, whole or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hf_folder import PARAMS, dense, save, write, write_json
from mlxlora_hf import detect, open_folder

from mlxlora_core.api import ModelError, NoOptions

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    **{f"self_attn.{letter}_proj": f"attention.w{letter}" for letter in "qkvo"},
}


def meta() -> dict[str, mx.array]:
    """The tensors by Meta's names; the numbers mean nothing."""
    found = {}
    for name, tensor in dense().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[name.removeprefix("model.")] = tensor
    return found


def write_mistral(
    folder: Path, params: dict[str, Any] = PARAMS, tokenizer: str = "tokenizer.model.v3"
) -> Path:
    folder.mkdir(exist_ok=True)
    save(folder / "consolidated.safetensors", meta())
    write_json(folder / "params.json", params)
    (folder / tokenizer).write_bytes(b"not looked at")
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_the_folder_has_metas_names_and_its_own_layout(tmp_path: Path, shards: bool) -> None:
    folder = write_mistral(tmp_path)
    if shards:
        (folder / "consolidated.safetensors").unlink()
        names = ("consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors")
        table = {name: names["layers.1" in name] for name in meta()}
        for shard in names:
            save(folder / shard, {name: tensor for name, tensor in meta().items() if table[name] == shard})
        write_json(folder / "consolidated.safetensors.index.json", {"weight_map": table})
    assert detect(folder)
    model = open_folder(folder, NoOptions())
    assert (model.layout, model.config) == ("", PARAMS)
    assert sorted(model.tensors) == sorted(meta())
    assert all(mx.array_equal(t.read(), meta()[name]).item() for name, t in model.tensors.items())
    assert dict(model.tokenizer) == {"tokenizer.model": folder / "tokenizer.model.v3"}
    assert list(model.notes) == ["tokenizer.model.v3 is taken for tokenizer.model"]


def test_a_folder_with_both_forms_is_read_as_hugging_faces(tmp_path: Path) -> None:
    write(write_mistral(tmp_path))
    assert open_folder(tmp_path, NoOptions()).layout == "hf"
    (tmp_path / "model.safetensors").unlink()
    assert (tmp_path / "config.json").exists()
    assert open_folder(tmp_path, NoOptions()).layout == ""


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["tekken.json", "tokenizer.model.v3"], {"tekken.json": "tekken.json"}),
        (["tokenizer.model", "tokenizer.model.v3"], {"tokenizer.model": "tokenizer.model"}),
        (["tokenizer.model.v7m1"], {"tokenizer.model": "tokenizer.model.v7m1"}),
        (
            ["tokenizer.json", "tokenizer_config.json"],
            {n: n for n in ("tokenizer.json", "tokenizer_config.json")},
        ),
    ],
)
def test_the_tokenizer(tmp_path: Path, names: list[str], taken: dict[str, str]) -> None:
    for name in names:
        write_mistral(tmp_path, tokenizer=name)
    tokenizer = open_folder(tmp_path, NoOptions()).tokenizer
    assert tokenizer == {name: tmp_path / file for name, file in taken.items()}


def test_what_is_refused(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path, {**PARAMS, "quantization": {"qformat_weight": "fp8_e4m3"}})
    with pytest.raises(ModelError, match="is quantized as fp8_e4m3"):
        open_folder(folder, NoOptions())
    write_mistral(tmp_path, tokenizer="tokenizer.model.v7")
    with pytest.raises(ModelError, match=r"several tokenizers: tokenizer.model.v3, tokenizer.model.v7"):
        open_folder(folder, NoOptions())
    for name in ("tokenizer.model.v3", "tokenizer.model.v7"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="there is no tokenizer"):
        open_folder(folder, NoOptions())
    (folder / "params.json").unlink()
    with pytest.raises(ModelError, match=r"there is no params\.json"):
        open_folder(folder, NoOptions())
