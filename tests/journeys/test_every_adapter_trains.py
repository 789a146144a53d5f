"""Each adapter on the base of the demo: trained, gone on with, measured, asked and fused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlxlora_demo
import pytest

Command = Callable[..., Any]
BASE = Path(mlxlora_demo.__file__).parent / "base"
BITS = {"dense": (), "8 bits": ("-q", "--q-bits", 8)}
#: adapter -> the base, what is set, and the learning rate
KINDS: dict[str, tuple[str, tuple[str, ...], float]] = {
    "lora": (
        "8 bits",
        ("targets=q_proj,v_proj,embed_tokens", "overrides=embed_tokens: rank=2, q_proj: scale=4"),
        3e-3,
    ),
    "rslora": ("dense", ("targets=*.attention.w*", "alpha=8"), 3e-3),
    "lora-plus": ("8 bits", ("targets=all-linear", "ratio=8"), 1e-3),
    "dora": ("8 bits", ("targets=all-linear", "dropout=0.1"), 3e-3),
    "pissa": ("dense", ("targets=attn_q,attn_v",), 3e-3),
    "ia3": ("8 bits", (), 3e-2),
    "vera": ("dense", ("rank=64", "targets=all-linear"), 3e-2),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the base of the demo stands as model folders; read them, never write to them."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def untrained() -> dict[str, float]:
    """Form of the base -> its loss on the rows, once it was measured."""
    return {}


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_goes_on_answers_and_fuses(
    mlxlora: Command, bases: Path, untrained: dict[str, float], tiny_data: Path, tmp_path: Path, name: str
) -> None:
    def run(*arguments: object) -> Any:
        done = mlxlora(*arguments)
        assert done.code == 0, done.err
        return done

    bits, sets, rate = KINDS[name]
    model = bases / bits
    if not model.is_dir():
        run("convert", "--torch-path", BASE, "--mlx-path", model, *BITS[bits], "--dtype", "float32")
    adapter = tmp_path / "adapter.safetensors"
    files = ("--model", model, "--data", tiny_data)
    begun = ("train", *files, "--adapter-file", adapter, "--adapter", name, "--learning-rate", rate)
    begun += tuple(part for text in sets for part in ("--set", f"adapter.{text}"))
    begun += ("--batch-size", 4, "--max-seq-length", 32, "--save-every", 2, "--steps-per-eval", 100)
    run(*begun, "--iters", 2)
    result = json.loads(run(*begun, "--iters", 6, "--resume", "--test", "--json").out)
    if bits not in untrained:
        untrained[bits] = json.loads(run("evaluate", *files, "--json").out)["loss"]
    assert result["test"]["loss"] < untrained[bits] - 0.05
    whole = tmp_path / "whole.safetensors"
    at_once = tuple(whole if argument is adapter else argument for argument in begun)
    run(*at_once, "--iters", 6)
    assert whole.read_bytes() == adapter.read_bytes()
    on_base = ("--model", model, "--adapter-file", adapter)
    loss = json.loads(run("evaluate", *on_base, "--data", tiny_data, "--json").out)["loss"]
    asked = ("-p", "A layer", "-n", 6, "--temp", 0)
    said = run("generate", *on_base, *asked).out
    fused = tmp_path / "fused"
    report = json.loads(run("fuse", *on_base, "--save-path", fused, "--dequantize", "--json").out)
    assert report["distance"] < 1e-4 < report["base_distance"]
    alone = json.loads(run("evaluate", "--model", fused, "--data", tiny_data, "--json").out)["loss"]
    assert alone == pytest.approx(loss, abs=1e-4)
    assert run("generate", "--model", fused, *asked).out == said
