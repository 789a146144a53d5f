"""``--quantize`` of verbs that open a model, in recipes and in Python: as if it had been converted so."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_forms
import pytest
import torch

import mlxlora_core
from mlxlora_core.errors import MlxloraError

Command = Callable[..., Any]
GGUF_CONFIG = model_forms.config(dim=256, hidden_dim=256, vocab_size=model_forms.GGUF_VOCAB)
BITS = ("-q", "--q-group-size", 32)
ASKED = ("--temp", 0, "-n", 8, "-p", "The adapter scales", "--json")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Hugging Face folder; read it, never write to it."""
    folder = tmp_path_factory.mktemp("dense") / "hf"
    model_forms.write_hf(folder, model_forms.config(), dtype=torch.bfloat16)
    return folder


@pytest.fixture
def packed(mlxlora: Command, dense: Path, tmp_path: Path) -> Path:
    """What ``convert -q`` makes of it."""
    folder = tmp_path / "packed"
    assert mlxlora("convert", "--model", dense, "--mlx-path", folder, *BITS).code == 0
    return folder


def train(mlxlora: Command, model: Path, data: Path, adapter: Path, *more: object) -> Any:
    files = ("--model", model, "--data", data, "--adapter-file", adapter)
    settings = ("--iters", 4, "--batch-size", 2, "--save-every", 2, "--lora-layers", -1)
    return mlxlora("train", *files, *settings, *more)


def test_an_adapter_belongs_to_the_model_in_these_bits(
    mlxlora: Command, dense: Path, packed: Path, tiny_data: Path, tmp_path: Path
) -> None:
    adapter, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    done = train(mlxlora, dense, tiny_data, adapter, *BITS)
    assert done.code == 0 and "14 weights are quantized by affine (group_size 32, bits 4)" in done.err
    assert train(mlxlora, packed, tiny_data, other).code == 0
    assert adapter.read_bytes() == other.read_bytes()
    with_it = ("--adapter-file", adapter)
    first = mlxlora("generate", "--model", dense, *BITS, *with_it, *ASKED)
    again = mlxlora("generate", "--model", packed, *with_it, *ASKED)
    assert first.code == again.code == 0
    told = [json.loads(done.out) for done in (first, again)]
    assert [told[0][key] for key in ("text", "finish")] == [told[1][key] for key in ("text", "finish")]
    for more in ((), ("-q",), (*BITS, "--q-bits", 8), (*BITS, "--set", "quantize.head=true")):
        refused = mlxlora("generate", "--model", dense, *more, *with_it, *ASKED)
        assert refused.code == 4 and "made for another base" in refused.err.splitlines()[-1], more
    files = ("--data", tiny_data, *with_it, "--json")
    losses = [mlxlora("evaluate", "--model", *model, *files) for model in ((dense, *BITS), (packed,))]
    assert json.loads(losses[0].out)["loss"] == json.loads(losses[1].out)["loss"]


def test_a_training_goes_on_with_the_same_bits_alone(
    mlxlora: Command, dense: Path, packed: Path, tiny_data: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "a.safetensors"
    assert train(mlxlora, dense, tiny_data, adapter, *BITS).code == 0
    for more in ((), (*BITS, "--q-bits", 8)):
        refused = train(mlxlora, dense, tiny_data, adapter, "--resume", "--iters", 6, *more)
        assert refused.code == 4 and "made with another base" in refused.err.splitlines()[-1]
    done = train(mlxlora, dense, tiny_data, adapter, "--resume", "--iters", 6, *BITS)
    assert done.code == 0, done.err
    on = train(mlxlora, packed, tiny_data, adapter, "--resume", "--iters", 8)
    assert on.code == 0, on.err


def test_it_is_fused_and_exported_as_it_was_trained(
    mlxlora: Command, dense: Path, packed: Path, tiny_data: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "a.safetensors"
    assert train(mlxlora, dense, tiny_data, adapter, *BITS).code == 0
    floats = ("--set", "export.dtype=float32")
    for name, model in (("one", (dense, *BITS)), ("two", (packed,))):
        files = ("--model", *model, "--adapter-file", adapter)
        fused = mlxlora("fuse", *files, "--save-path", tmp_path / f"fused-{name}")
        assert fused.code == 0, fused.err
        exported = mlxlora("export", "--to", "npz", *files, *floats, "--out", tmp_path / f"npz-{name}")
        assert exported.code == 0, exported.err
    for file in ("fused-{}/model.safetensors", "npz-{}/weights.npz", "npz-{}/adapters.npz"):
        one, two = (tmp_path / file.format(name) for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), file


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--q-bits", 8), 2, "bits given without -q"),
        (("--set", "quantize.head=true"), 2, "head given without -q"),
        (("-q", "--q-bits", 7), 2, "'bits': must be one of"),
        (("--quantize", "odd"), 8, "no quantizer 'odd'"),
        (("-q", "--q-group-size", 128), 2, "nothing is quantized: quantizer 'affine'"),
        (("-q", "--set", "quantize.haed=true"), 2, "head"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    mlxlora: Command, dense: Path, flags: tuple[object, ...], code: int, says: str
) -> None:
    refused = mlxlora("generate", "--model", dense, *flags, *ASKED)
    assert refused.code == code and says in refused.error


def test_a_file_that_is_packed_already_is_one_line(mlxlora: Command, tmp_path: Path) -> None:
    model_forms.write_gguf(tmp_path / "model.gguf", GGUF_CONFIG, ("Q4_K", "Q8_0"), tied=True)
    refused = mlxlora("generate", "--model", tmp_path / "model.gguf", "-q", *ASKED)
    assert refused.code == 2 and "is quantized already" in refused.error


def test_weights_of_q6_k_are_taken_and_told(mlxlora: Command, tmp_path: Path) -> None:
    model_forms.write_gguf(tmp_path / "model.gguf", GGUF_CONFIG, ("Q6_K", "Q4_K", "Q8_0"), tied=True)
    done = mlxlora("generate", "--model", tmp_path / "model.gguf", "-q", "--q-bits", 8, *ASKED)
    (line,) = [line for line in done.err.splitlines() if "are quantized by affine" in line]
    assert done.code == 0 and "(group_size 64, bits 8)" in line and "packed stay as they are" in line


# --- recipes ------------------------------------------------------------------

RECIPE = """
run.folder = "{folder}"
[model]
{path} = "{model}"
[quantize]
use = "affine"
options = {{ group_size = 32, bits = {bits} }}
[data]
use = "jsonl"
options = {{ path = "{data}" }}
[train]
iters = 2
batch_size = 2
[generate]
prompts = ["The adapter scales"]
num_tokens = 4
[export]
use = "npz"
options = {{ dtype = "float32" }}
"""


def run(mlxlora: Command, work: Path, **values: Any) -> tuple[Any, Any]:
    recipe = work / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=work / values.pop("folder"), **values))
    done = mlxlora("run", recipe)
    assert done.code == 0, done.err
    return done, json.loads(next((work / "recipe.toml").parent.glob("*/run.json")).read_text())


def test_a_recipe_quantizes_the_model_that_it_uses_as_it_is(
    mlxlora: Command, dense: Path, tiny_data: Path, tmp_path: Path
) -> None:
    rows = tiny_data / "train.jsonl"
    (tmp_path / "opened").mkdir()
    (tmp_path / "made").mkdir()
    values = {"model": dense, "data": rows, "bits": 4, "folder": "run"}
    done, opened = run(mlxlora, tmp_path / "opened", path="mlx_path", **values)
    _, made = run(mlxlora, tmp_path / "made", path="torch_path", **values)
    assert opened["summary"]["losses"] == made["summary"]["losses"]
    adapters = [tmp_path / place / "run" / "adapter" / "adapter.safetensors" for place in ("opened", "made")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert not (tmp_path / "opened" / "run" / "model").exists()
    assert f"uses {dense}, quantized by affine:affine when it is opened" in done.err
    exported = [tmp_path / place / "run" / "export" / "weights.npz" for place in ("opened", "made")]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    # The command to ask it is one that works.
    command = done.out.splitlines()[-1].strip().split(maxsplit=1)[1]
    assert "--quantize affine:affine --set quantize.group_size=32" in command
    asked = mlxlora(*shlex.split(command))
    assert asked.code == 0 and asked.out, asked.err
    again, _ = run(mlxlora, tmp_path / "opened", path="mlx_path", **values)
    assert "[train] done already" in again.err
    other, _ = run(mlxlora, tmp_path / "opened", path="mlx_path", **{**values, "bits": 8})
    assert "[train] done already" not in other.err


# --- Python -------------------------------------------------------------------


def test_load_quantizes_too(dense: Path, packed: Path) -> None:
    want = mlxlora_core.load(packed).base.fingerprint
    asked = {"use": "affine", "group_size": 32}
    assert mlxlora_core.load(dense, quantize=asked).base.fingerprint == want
    assert mlxlora_core.load(dense, quantize={"group_size": 32, "bits": 4}).base.fingerprint == want
    assert mlxlora_core.load(dense, quantize="affine").base.fingerprint != want
    assert mlxlora_core.load(dense).base.quantization is None


def test_python_fuses_and_exports_what_it_quantized(dense: Path, tmp_path: Path) -> None:
    asked = {"group_size": 32, "bits": 8}
    adapter = tmp_path / "a.safetensors"
    mlxlora_core.load(dense, quantize=asked).attach("lora", layers=-1).save_adapter(adapter)
    with pytest.raises(MlxloraError, match="made for another base"):
        mlxlora_core.fuse(dense, adapter, tmp_path / "fused")
    report = mlxlora_core.fuse(dense, adapter, tmp_path / "fused", quantize=asked)
    assert report.rounded == report.linears > 0
    files = {"adapter_file": adapter, "dtype": "float32"}
    exported = mlxlora_core.export(dense, "npz", tmp_path / "npz", quantize=asked, **files)
    assert "weights.npz" in exported.files


@pytest.mark.parametrize(
    ("quantize", "says"),
    [
        (4, "wanted a name, or a mapping with use, got 4"),
        ({"use": None}, "wanted a name, or a mapping with use"),
        ({"bits": 7}, "'bits': must be one of"),
        ({"bit": 4}, "did you mean 'bits'"),
        ("odd", "no quantizer 'odd'"),
    ],
)
def test_load_tells_what_it_cannot_do(dense: Path, quantize: Any, says: str) -> None:
    with pytest.raises(MlxloraError) as caught:
        mlxlora_core.load(dense, quantize=quantize)
    assert says in str(caught.value)
