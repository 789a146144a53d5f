"""A recipe whose last stage writes the tuned model for transformers, with a card that says what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

RECIPE = """
[run]
folder = "{folder}"
[model]
torch_path = "{checkpoint}"
dtype = "float32"
[data]
use = "jsonl"
options = {{ path = "{data}" }}
[adapter]
options = {{ rank = 2 }}
targets = ["all-linear"]
[train]
iters = 4
batch_size = 2
learning_rate = 1e-2
[generate]
num_tokens = 4
[export]
use = "hf"
"""


def test_the_tuned_model_comes_out_with_its_card(
    mlxlora: Callable[..., Any], tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(folder=run, checkpoint=tiny_checkpoint, data=tiny_data))
    done = mlxlora("run", recipe)
    assert done.code == 0, done.err
    out = run / "export"
    card = (out / "README.md").read_text()
    losses = json.loads((run / "run.json").read_text())["stages"]["after"]["result"]["losses"]
    assert f"{losses['test']['loss']:.4f} after" in card
    digest = hashlib.sha256((run / "data" / "train.jsonl").read_bytes()).hexdigest()
    assert digest in card and "4 steps of 2 rows" in card
    assert "`lora:lora` on 14 linears: rank 2" in card
    assert str(tmp_path) not in card
    # It is the tuned model: what the adapter answers on the base, this answers by itself.
    held: Any = mx.load(str(out / "model.safetensors"))
    base: Any = mx.load(str(run / "model" / "model.safetensors"))
    value = "model.layers.1.self_attn.v_proj.weight"
    assert not mx.array_equal(held[value], base["layers.1.attention.wv.weight"])
    asked = ("-p", "a prompt", "-n", 8, "--sampler", "greedy")
    adapter = run / "adapter" / "adapter.safetensors"
    told = mlxlora("generate", "--model", run / "model", "--adapter-file", adapter, *asked)
    alone = mlxlora("generate", "--model", out, "--no-adapter", *asked)
    assert told.code == alone.code == 0 and told.out == alone.out != ""
    again = mlxlora("run", recipe)
    assert again.code == 0 and "export" in again.err
