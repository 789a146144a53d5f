"""A model in a GGUF file, from the file to its answers: against torch, converted, and trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import llama_torch
import mlx.core as mx
import model_forms
import numpy as np
import pytest
import torch
from model_forms import GGUF_VOCAB

from mlxlora_core.model import loading
from mlxlora_core.model.linears import is_packed, linears
from mlxlora_core.plugins import load as load_registry

CONFIG = model_forms.config(dim=256, hidden_dim=256, vocab_size=GGUF_VOCAB)
CASES = {"packed": gguf_files.PACKED, "mixed": ("Q4_K", "Q6_K", "F16", "BF16", "F32", "Q8_0")}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "with a head"])
@pytest.mark.parametrize("kinds", CASES.values(), ids=list(CASES))
def test_logits_are_those_of_torch(kinds: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    weights = model_forms.write_gguf(tmp_path / "model.gguf", CONFIG, kinds, tied=tied)
    model = loading.load(tmp_path / "model.gguf", load_registry(environ={"MLXLORA_PLUGINS": ""}))
    assert [path for path, linear in linears(model.module) if is_packed(linear)]
    ids = model.tokenizer.encode("hello hell, 12 caf\u00e9!")
    assert ids[0] == 261
    want = llama_torch.logits(weights, torch.tensor([ids]), CONFIG)[0].numpy()
    got = np.array(model.module(mx.array([ids]))[0].astype(mx.float32))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_it_generates_converts_and_trains(
    mlxlora: Callable[..., Any], tiny_data: Path, tmp_path: Path
) -> None:
    source, folder = tmp_path / "model.gguf", tmp_path / "model"
    model_forms.write_gguf(source, CONFIG, CASES["mixed"], tied=True)
    asked = ("--temp", "0", "-n", "8", "-p", "hello", "--json")
    first = mlxlora("generate", "--model", source, *asked)
    assert first.code == 0, first.err
    done = mlxlora("convert", "--torch-path", source, "--mlx-path", folder, "--dtype", "float32")
    assert done.code == 0 and "are expanded to float32" in done.err + done.out, done.err
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "generation_config.json"}
    again = mlxlora("generate", "--model", folder, *asked)
    assert json.loads(again.out)["text"] == json.loads(first.out)["text"]
    adapter = tmp_path / "adapter.safetensors"
    files = ("--model", source, "--data", tiny_data, "--adapter-file", adapter)
    trained = mlxlora("train", *files, "--iters", "3", "--batch-size", "2", "--lora-layers", "-1")
    assert trained.code == 0, trained.err
    adapted = mlxlora("generate", "--model", source, "--adapter-file", adapter, *asked)
    assert adapted.code == 0, adapted.err
