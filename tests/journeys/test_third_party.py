"""Five distributions written from the documentation alone, in one recipe; and plugins that are faulty."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from third_party import mosaic_model

SOURCES = Path(__file__).with_name("third_party")
MINE = ("bytes", "eventlog", "int8", "mosaic", "rawbin")
RECIPE = """
[run]
folder = "out"
[model]
torch_path = "base.npz"
dtype = "float32"
[loader]
use = "mosaic-npz"
[quantize]
use = "int8"
options = { experts_only = true }
[data]
use = "jsonl"
options = { path = "rows" }
[adapter]
use = "lora"
options = { rank = 4, scale = 3.0 }
[train]
iters = 30
learning_rate = 1e-2
steps_per_eval = 15
[checkpoints]
save_every = 15
[generate]
prompts = ["After 12: "]
num_tokens = 3
[export]
use = "rawbin"
[observe]
use = ["eventlog"]
"""
REQUIRE = """[plugins]
require = ["acme-bytes>=1", "acme-int8==1.2", "acme-mosaic", "acme-rawbin", "acme-eventlog<2"]
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the five, which building may write into."""
    return shutil.copytree(SOURCES, tmp_path_factory.mktemp("sources") / "third_party")


@pytest.fixture(scope="module")
def environment(sources: Path, make_environment: Callable[[str], Any]) -> Any:
    """An environment in which pip has installed the five."""
    made = make_environment("acme")
    made.pip("install", "--no-deps", *sorted(p.parent for p in sources.glob("*/pyproject.toml")), cwd=sources)
    return made


@dataclass(frozen=True)
class Run:
    """A run that used the five, in a folder of its own."""

    folder: Path
    code: int
    record: Mapping[str, Any]
    stderr: str

    def result(self, stage: str) -> Any:
        return self.record["stages"][stage]["result"]


@pytest.fixture(scope="module")
def run(environment: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    write_sources(folder)
    done = environment.mlxlora("run", "recipe.toml", "--json", cwd=folder)
    return Run(folder, done.returncode, json.loads(done.stdout or "{}"), done.stderr)


def write_sources(folder: Path) -> None:
    """The checkpoint, rows of all three shapes, and the recipe."""
    mosaic_model.write(folder, mosaic_model.random_weights())
    (folder / "rows").mkdir()
    for name, numbers in (("train", range(10, 30)), ("valid", range(40, 43)), ("test", range(50, 53))):
        lines = [json.dumps(row) + "\n" for number in numbers for row in rows_of(number)]
        (folder / "rows" / f"{name}.jsonl").write_text("".join(lines))
    (folder / "recipe.toml").write_text(RECIPE + REQUIRE)


def rows_of(number: int) -> Iterator[dict[str, Any]]:
    yield {"text": f"The number {number} comes after {number - 1}."}
    yield {"prompt": f"After {number}: ", "completion": f"{number + 1} é"}
    yield {
        "messages": [
            {"role": "user", "content": f"What is after {number}?"},
            {"role": "assistant", "content": f"It is {number + 1}."},
        ]
    }


def ids_of(row: Mapping[str, Any]) -> list[int]:
    """The ids that a row should have, by the description of the tokenizer."""
    if "messages" in row:
        question, answer = (message["content"].encode() for message in row["messages"])
        return [*b"? ", *question, *b"\n! ", *answer, 256]
    return [*(row.get("text") or row["prompt"] + row["completion"]).encode(), 257]


# --- their authors' own tests -------------------------------------------------


def test_the_suites_of_their_kinds_pass(environment: Any, sources: Path) -> None:
    done = environment.run(environment.python, "-m", "pytest", "-q", "conformance.py", cwd=sources)
    assert done.returncode == 0, done.stdout
    # The slope of a loss that jumps; packed weights and a single file, of which the exporter has none;
    # packed rows twice over and rows of different lengths, which the architecture does not take; a product
    # that is bound; code in files, a second tokenizer, and a mixture in half precision, which no CPU has.
    assert "25 skipped" in done.stdout


# --- one recipe with all of them ----------------------------------------------


def test_every_stage_is_done_by_them(run: Run) -> None:
    assert run.code == 0, run.stderr
    assert "Traceback" not in run.stderr and "warning" not in run.stderr
    assert list(run.record["stages"]) == ["model", "data", "before", "train", "after", "export"]
    assert {name: run.record["plugins"][name] for name in MINE} == {n: f"acme-{n} 1.2" for n in MINE}
    assert run.result("model")["loader"] == "mosaic:mosaic-npz"
    assert run.result("model")["architecture"] == "mosaic:mosaic"
    assert run.result("model")["padding"] == mosaic_model.VOCABULARY - 258
    assert run.result("data")["rows"] == {"train": 60, "valid": 9, "test": 9}


def test_the_stacks_are_on_the_disk_in_8_bits(run: Run) -> None:
    weights = mosaic_model.random_weights()
    stored = mx.load(str(run.folder / "out" / "model" / "model.safetensors"))
    for layer in range(2):
        for part in mosaic_model.EXPERT_PARTS:
            path = f"layers.{layer}.mixture.{part}"
            dense = np.stack([weights[f"blocks.{layer}.moe.experts.{e}.{part}.weight"] for e in range(4)])
            scale = np.abs(dense).max(axis=-1) / 127
            assert f"{path}.weight" not in stored
            np.testing.assert_allclose(np.array(stored[f"{path}.scale"]), scale, rtol=1e-6)
            values = np.array(stored[f"{path}.values"])
            assert values.dtype == np.int8
            np.testing.assert_allclose(values, np.round(dense / scale[..., None]), atol=0)
    left = run.result("model")["left_dense"]
    assert len(left) == 2 * 5 and "layers.0.mixture.router" in left
    assert all(f"{path}.weight" in stored for path in left)
    config = json.loads((run.folder / "out" / "model" / "config.json").read_text())
    assert config["quantizer"] == "int8:int8" and len(config["quantized"]) == 2 * 3


def rounded(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a checkpoint is after its experts were stored in 8 bits."""
    found = dict(weights)
    for name, weight in weights.items():
        if ".experts." in name:
            scale = np.abs(weight).max(axis=-1, keepdims=True) / 127
            found[name] = (np.round(weight / scale) * scale).astype(np.float32)
    return found


def test_the_loss_before_is_that_of_the_reference(run: Run) -> None:
    """Loader, split, permutation, stacks, quantizer, tokenizer and rows: one number holds them all."""
    rows = [ids_of(row) for number in range(50, 53) for row in rows_of(number)]
    got = run.result("before")["losses"]["test"]
    assert got["tokens"] == sum(len(ids) - 1 for ids in rows), "without a begin id the first is not told"
    weights = rounded(mosaic_model.random_weights())
    assert got["loss"] == pytest.approx(mosaic_model.loss(weights, rows), abs=1e-4)


def exported(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an export, by numpy."""
    index = json.loads((folder / "index.json").read_text())["tensors"]
    return {
        name: np.fromfile(folder / entry["file"], dtype=entry["dtype"]).reshape(entry["shape"])
        for name, entry in index.items()
    }


def as_checkpoint(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a model under the names and in the order of a checkpoint."""

    def halves(rows: np.ndarray) -> np.ndarray:
        heads = mosaic_model.CONFIG["n_heads"]
        return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    found = {
        "embed.weight": tensors["tokens.weight"],
        "final.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    for i in range(2):
        ours, theirs = f"layers.{i}.", f"blocks.{i}."
        q, k, v = (tensors[f"{ours}attention.{name}.weight"] for name in ("wq", "wk", "wv"))
        found[f"{theirs}attn.qkv.weight"] = np.concatenate([halves(q), halves(k), v])
        found[f"{theirs}attn.out.weight"] = tensors[f"{ours}attention.wo.weight"]
        found[f"{theirs}moe.router.weight"] = tensors[f"{ours}mixture.router.weight"]
        for norm in ("norm1", "norm2"):
            found[f"{theirs}{norm}.weight"] = tensors[f"{ours}{norm}.weight"]
        for part in mosaic_model.EXPERT_PARTS:
            for expert, weight in enumerate(tensors[f"{ours}mixture.{part}.weight"]):
                found[f"{theirs}moe.experts.{expert}.{part}.weight"] = weight
    return found


def test_what_is_exported_has_the_adapter_in_it(run: Run) -> None:
    """The base's tensors, those of the adapted linears changed as the adapter file says, and nothing else."""
    before = rounded(mosaic_model.random_weights())
    after = exported(run.folder / "out" / "export")
    trained = mx.load(str(run.folder / "out" / "adapter" / "adapter.safetensors"))
    adapted = run.result("train")["adapted"]
    assert adapted == [f"layers.{i}.attention.{name}" for i in range(2) for name in ("wq", "wv")]
    without = dict(after)
    for path in adapted:
        a, b = (np.array(trained[f"{path}.lora_{letter}"]) for letter in "ab")
        assert a.shape == (32, 4) and np.abs(b).max() > 1e-3, "it trained"
        without[f"{path}.weight"] = after[f"{path}.weight"] - 3.0 * (a @ b).T
    found = as_checkpoint(without)
    assert found.keys() == before.keys()
    for name, weight in before.items():
        np.testing.assert_allclose(found[name], weight, atol=1e-6, err_msg=name)
    index = json.loads((run.folder / "out" / "export" / "index.json").read_text())
    assert index["adapter"] == {"name": "lora:lora", "paths": adapted}
    assert "quantizer" not in index["config"]
    assert (run.folder / "out" / "export" / "bytes.json").read_bytes() == (
        run.folder / "bytes.json"
    ).read_bytes()


def test_the_loss_after_is_that_of_the_export(run: Run) -> None:
    """The reference finds in the exported files what the adapted model was measured to have; and it fell."""
    rows = [ids_of(row) for number in range(50, 53) for row in rows_of(number)]
    before, after = (run.result(stage)["losses"]["test"]["loss"] for stage in ("before", "after"))
    weights = as_checkpoint(exported(run.folder / "out" / "export"))
    assert after == pytest.approx(mosaic_model.loss(weights, rows), abs=1e-4)
    assert after < before - 0.5


def test_the_observer_was_told_everything_in_order(run: Run) -> None:
    (path,) = (run.folder / "out").glob("*.events.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    told = [event for event in events if event["kind"] != "note"]
    stages = [(e["kind"].removeprefix("stage_"), e["stage"]) for e in told if "stage" in e]
    assert stages == [(what, stage) for stage in run.record["stages"] for what in ("started", "done")]
    start, end = ({"kind": kind, "stage": "train"} for kind in ("stage_started", "stage_done"))
    names = [{k: e[k] for k in ("kind", "stage") if k in e} for e in told]
    within = [(e["kind"], e.get("step")) for e in told[names.index(start) + 1 : names.index(end)]]
    assert within == [
        ("training_started", 0),
        ("valid", 0),
        ("train", 10),
        ("valid", 15),
        ("checkpoint_saved", 15),
        ("train", 20),
        ("train", 30),
        ("valid", 30),
        ("checkpoint_saved", 30),
        ("train_result", None),
    ]
    losses = [event["loss"] for event in told if event["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert events[-1] == {"kind": "end", "how": "done"}


def test_a_second_run_does_nothing(run: Run, environment: Any) -> None:
    files = {path: path.read_bytes() for path in (run.folder / "out").rglob("*.*") if path.suffix != ".html"}
    again = environment.forked("run", "recipe.toml", "--json", cwd=run.folder)
    assert again.returncode == 0, again.stderr
    told = [line for line in again.stderr.splitlines() if line.startswith("[")]
    assert told == [f"[{stage}] done already" for stage in run.record["stages"]]
    changed = [path.name for path, data in files.items() if path.read_bytes() != data]
    assert set(changed) <= {"run.json"}


def test_what_is_not_installed_is_named_in_one_line(
    run: Run, make_environment: Callable[[str], Any], tmp_path: Path
) -> None:
    bare = make_environment("bare")
    write_sources(tmp_path)
    for verb in ((), ("--dry-run",)):
        done = bare.mlxlora("run", "recipe.toml", *verb, cwd=tmp_path)
        (line,) = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (8, "")
        for name in ("acme-bytes>=1", "acme-int8==1.2", "acme-mosaic", "acme-rawbin", "acme-eventlog<2"):
            assert f"'{name}' is not installed" in line
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = bare.mlxlora("run", "recipe.toml", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 8
    for what in ("loader 'mosaic-npz'", "quantizer 'int8'", "exporter 'rawbin'", "observer 'eventlog'"):
        assert f"no {what}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("left_out", "code", "said"),
    [
        ("int8", 8, "no quantizer 'int8:int8' (there is affine); plugin int8 (acme-int8 1.2) is disabled"),
        ("mosaic", 4, "model_type 'mosaic' is not known"),
        ("bytes", 4, "no tokenizer opens bytes.json"),
    ],
)
def test_a_model_whose_plugin_is_gone_is_told_so(
    run: Run, environment: Any, left_out: str, code: int, said: str
) -> None:
    arguments = ("--model", "out/model", "--data", "out/data", "-P", f"no:{left_out}")
    done = environment.forked("evaluate", *arguments, cwd=run.folder)
    assert done.returncode == code
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# --- plugins that are faulty --------------------------------------------------

IMPORTS = "import mlx.core as mx\nimport mlx.nn as nn\nfrom mlxlora_core.api import *\n"
SAMPLER = """
def build(options):
    def transform{arguments}:
        return logits
    return transform

@hookimpl
def mlxlora_samplers():
    return [Sampler(name="odd", summary="s", build=build)]
"""
ADAPTER = """
class Scaled(nn.Module):
    def __init__(self, linear, outputs):
        super().__init__()
        self.{child} = linear
        self.{child}.freeze()
        self.scale = mx.ones((outputs,))

    def __call__(self, x):
        return self.{child}(x) * self.scale.astype(x.dtype)

@hookimpl
def mlxlora_adapters():
    def wrap(linear, place, options):
        return None if len(place.shape) == 3 else Scaled(linear, place.shape[0])
    def fuse(module, weight):
        return {fused}
    return [Adapter(name="odd", summary="s", wrap=wrap, fuse=fuse)]
"""
QUANTIZER = """
def quantize(weight, options):
    return {given}

@hookimpl
def mlxlora_quantizers():
    def dequantize(parts, options):
        return parts["values"] * parts["scale"]
    parts = ("values", "scale")
    return [Quantizer(name="odd", summary="s", parts=parts, quantize=quantize, dequantize=dequantize)]
"""


@dataclass(frozen=True)
class Faulty:
    """The code of a plugin, ``odd.py``, and the line that it must end a verb with."""

    code: str
    said: str


SAMPLERS = {
    "too few": Faulty(
        SAMPLER.format(arguments="(logits)"),
        "build gives a function (logits), wanted a function (logits, tokens)",
    ),
    "too many": Faulty(
        SAMPLER.format(arguments="(logits, tokens, key)"),
        "build gives a function (logits, tokens, key), wanted a function (logits, tokens)",
    ),
}
QUANTIZERS = {
    "a linear": Faulty(
        QUANTIZER.format(given="nn.Linear(weight.shape[-1], weight.shape[-2])"),
        "quantize gives parts weight, bias, wanted values, scale",
    ),
    "half of it": Faulty(
        QUANTIZER.format(given='{"values": weight}'), "quantize gives parts values, wanted values, scale"
    ),
    "nothing": Faulty(QUANTIZER.format(given="{}"), "quantize gives parts none, wanted values, scale"),
    "the weight": Faulty(QUANTIZER.format(given="weight"), "quantize gives array, wanted"),
}


def refused(run: Run, environment: Any, faulty: Faulty, kind: str, *arguments: str) -> None:
    """The verb ends with 8, one line of error, no traceback, and no file that was not there before."""
    (run.folder / "odd.py").write_text(IMPORTS + faulty.code)
    before = sorted(run.folder.rglob("*"))
    done = environment.forked(*arguments, "-P", "./odd.py", cwd=run.folder, PYTHONDONTWRITEBYTECODE="1")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mlxlora:")]
    assert (done.returncode, done.stdout) == (8, ""), done.stderr
    assert line == done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert line.startswith(f"mlxlora: {kind} odd:odd: {faulty.said}"), line
    assert "/tmp" not in line and str(run.folder) not in line, "the fault is the plugin's, not a file's"
    assert sorted(run.folder.rglob("*")) == before


@pytest.mark.parametrize("fault", SAMPLERS)
def test_a_sampler_of_other_arguments(run: Run, environment: Any, fault: str) -> None:
    arguments = ("generate", "--model", "out/model", "--sampler", "odd", "--prompt", "After 1")
    refused(run, environment, SAMPLERS[fault], "sampler", *arguments)
    arguments = ("--model", "out/model", "--data", "out/data", "--adapter-file", "spoken.safetensors")
    speaks = ("--sampler", "odd", "--prompt", "After 1")
    refused(run, environment, SAMPLERS[fault], "sampler", "train", *arguments, *speaks)


@pytest.mark.parametrize("fault", QUANTIZERS)
def test_a_quantizer_that_gives_something_else(run: Run, environment: Any, fault: str) -> None:
    arguments = ("convert", "-q", "odd", "--torch-path", "base.npz", "--mlx-path", "model")
    refused(run, environment, QUANTIZERS[fault], "quantizer", *arguments)


LIES = {
    "arrays of numpy": (
        "return mx.array(array)",
        "return array",
        "loader odd:mosaic-npz: open gives blocks.0.norm1.weight that reads ndarray, wanted mlx.core.array",
    ),
    "another shape than told": (
        "return mx.stack(",
        "return mx.concatenate(",
        "architecture odd:mosaic: tensors gives layers.0.mixture.gate.weight that reads (96, 32), "
        "wanted (4, 24, 32), as told",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_tensor_that_is_not_what_was_told_of_it(
    run: Run, environment: Any, tmp_path: Path, lie: str
) -> None:
    good, bad, said = LIES[lie]
    code = (SOURCES / "acme-mosaic" / "acme_mosaic.py").read_text()
    assert code.count(good) == 1
    (tmp_path / "odd.py").write_text(code.replace(good, bad))
    files = ("--torch-path", run.folder / "base.npz", "--mlx-path", "model")
    done = environment.forked("convert", "-P", "no:mosaic", "-P", "./odd.py", *files, cwd=tmp_path)
    assert done.returncode == 8, done.stderr
    assert done.stderr.splitlines()[-1] == f"mlxlora: {said}"
    assert not (tmp_path / "model").exists()


def test_an_adapter_without_its_linear_is_refused_before_it_trains(run: Run, environment: Any) -> None:
    said = "wrap gives a Scaled without the linear, wanted a module that keeps it as its child 'linear'"
    faulty = Faulty(ADAPTER.format(child="inner", fused="weight"), said)
    arguments = ("--model", "out/model", "--data", "out/data", "--adapter-file", "odd.safetensors")
    refused(run, environment, faulty, "adapter", "train", "--adapter", "odd", *arguments)


def test_an_adapter_that_fuses_to_another_shape(run: Run, environment: Any) -> None:
    faulty = Faulty(
        ADAPTER.format(child="linear", fused="weight[:3]"),
        "fuse gives (3, 32) float32, wanted (32, 32) float32",
    )
    (run.folder / "odd.py").write_text(IMPORTS + faulty.code)
    files = ("--model", "out/model", "--adapter-file", "odd.safetensors")
    trained = environment.forked(
        *("train", "--adapter", "odd", "--set", "adapter.targets=wq", "--iters", "2", "-P", "./odd.py"),
        *(*files, "--data", "out/data"),
        cwd=run.folder,
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert trained.returncode == 0, trained.stderr
    refused(run, environment, faulty, "adapter", "fuse", *files, "--save-path", "fused")
    refused(run, environment, faulty, "adapter", "export", *files, "--to", "rawbin", "--out", "raw")


def test_of_several_plugins_the_one_that_fails_is_blamed(run: Run, environment: Any) -> None:
    """A tokenizer streams what an architecture computes with an adapter; the adapter alone is at fault."""
    code = IMPORTS + ADAPTER.format(child="linear", fused="weight")
    plugin = run.folder / "odd.py"
    files = ("--model", "out/model", "--adapter-file", "late.safetensors", "-P", "./odd.py")

    def mlxlora(*arguments: str) -> Any:
        return environment.forked(*arguments, *files, cwd=run.folder, PYTHONDONTWRITEBYTECODE="1")

    plugin.write_text(code)
    trained = mlxlora("train", "--adapter", "odd", "--data", "out/data", "--iters", "1")
    assert trained.returncode == 0, trained.stderr
    start = "    def __call__(self, x):\n"
    plugin.write_text(code.replace(start, f"{start}        assert x.shape[1] > 1, 'one token'\n"))
    done = mlxlora("generate", "--prompt", "After 1")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mlxlora: ")]
    assert done.returncode == 8 and line == done.stderr.splitlines()[-1]
    assert "odd.py:" in line and "plugin odd (file) failed: AssertionError: one token" in line


def test_a_prompt_without_a_token(run: Run, environment: Any) -> None:
    done = environment.forked("generate", "--model", "out/model", "--prompt", "", cwd=run.folder)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "the prompt is empty, and texts of this model have no begin token" in line


def test_a_misspelt_name_in_the_list_of_plugins(run: Run, environment: Any) -> None:
    arguments = ("generate", "--model", "out/model", "--prompt", "x")
    listed = "bytes,int8,mosiac"
    done = environment.forked(*arguments, cwd=run.folder, MLXLORA_PLUGINS=listed)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (8, "")
    assert line.startswith("mlxlora: MLXLORA_PLUGINS names no plugin: 'mosiac' (did you mean 'mosaic'?")


# --- a quantizer whose only part is called weight and holds no fractions -------

FP8 = """
@hookimpl
def mlxlora_quantizers():
    def quantize(weight, options):
        return {"weight": mx.to_fp8(weight)}
    def dequantize(parts, options):
        return mx.from_fp8(parts["weight"], mx.float32)
    return [Quantizer(name="fp8", summary="s", parts=("weight",), quantize=quantize, dequantize=dequantize)]
"""


def test_a_quantizer_of_whole_numbers_alone_is_fused_and_exported(run: Run, environment: Any) -> None:
    (run.folder / "fp8.py").write_text(IMPORTS + FP8)

    def done(*arguments: str) -> None:
        result = environment.forked(*arguments, "-P", "./fp8.py", cwd=run.folder)
        assert result.returncode == 0, result.stderr

    done("convert", "-q", "fp8", "--torch-path", "base.npz", "--mlx-path", "of8")
    files = ("--model", "of8", "--adapter-file", "of8.safetensors")
    done("train", *files, "--data", "out/data", "--iters", "2")
    done("fuse", *files, "--save-path", "fused8")
    assert (
        mx.load(str(run.folder / "fused8" / "model.safetensors"))["layers.0.attention.wq.weight"].dtype
        == mx.uint8
    )
    done("export", "--model", "of8", "--to", "rawbin", "--out", "raw8")
    found = as_checkpoint(exported(run.folder / "raw8"))
    for name, weight in mosaic_model.random_weights().items():
        error = np.abs(found[name] - weight).max()
        assert error <= np.abs(weight).max() / 15, f"{name}: fp8 keeps 3 bits of the fraction"
