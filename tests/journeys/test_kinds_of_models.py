"""Every kind of model that ``--model`` takes, through the verbs: trained, killed, resumed, asked, fused, run.

What comes out is held against torch in float64, which computes with the numbers that stand in the
files: the base as its form has it, and ``W + scale · (A B)ᵀ`` of the adapter file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_torch
import mlx.core as mx
import model_forms
import numpy as np
import pytest
import torch
from loopback_hub import serving
from model_forms import GGUF_VOCAB, Bits, Config, Weights
from safetensors.torch import load_file
from small_tokenizers import LINES
from warm import Done, Warm

from mlxlora_core import plugins
from mlxlora_core.model import adapters, loading

pytestmark = pytest.mark.usefixtures("one_torch_thread")
REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
SCALE, STEPS, KILLED_AT = 2.0, 6, 4
TRAIN = f"""
    train --iters {STEPS} --save-every 2 --batch-size 2 --learning-rate 1e-2 --steps-per-report 1
    --lora-layers -1 --set adapter.targets=all-linear --set adapter.rank=2 --set adapter.dropout=0.1
""".split()
PROMPT = "the layer"
#: how far logits may be from those of base and adapter where nothing is rounded but dense weights
NEAR = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
ADAPTER = "adapter/adapter.safetensors"
STAGES = ("model", "data", "before", "train", "after")

RECIPE = """
[run]
folder = "{folder}"
[model]
{key} = "{model}"
{dtype}
[data]
use = "jsonl"
options = {{ path = "data" }}
[adapter]
layers = -1
targets = ["all-linear"]
options = {{ rank = 2, dropout = 0.1 }}
[train]
iters = {steps}
batch_size = 2
learning_rate = 1e-2
[generate]
prompts = ["{prompt}"]
num_tokens = 4
"""

KILLER = f'''
"""An observer that ends the process when a step is reported, as a loss of power does."""

import os
import signal

from mlxlora_core.api import Observer, hookimpl


class Watcher:
    def event(self, event):
        if event.get("step") == {KILLED_AT}:
            os.kill(os.getpid(), signal.SIGKILL)

    def end(self, how):
        pass


@hookimpl
def mlxlora_observers():
    return [Observer(name="killer", summary="kills", start=lambda run, options: Watcher())]
'''


@dataclass(frozen=True)
class Given:
    """A model of some kind.

    Attributes:
        named: what ``--model`` gets.
        path: where it is.
        config: as :mod:`llama_torch` takes it.
        weights: what stands in its files.
        variables: of the environment that it is found in.
    """

    named: str
    path: Path
    config: Config
    weights: Weights
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What kinds are made with.

    Attributes:
        folder: of one's own.
        run: runs a command line that must succeed.
        checkpoint: the Meta layout, 64 wide.
        tokenizer: of SentencePiece.
    """

    folder: Path
    run: Callable[..., Done]
    checkpoint: Path
    tokenizer: Path


Make = Callable[[Parts], Given]


def own(*more: object) -> Make:
    def make(parts: Parts) -> Given:
        path = parts.folder / "own"
        parts.run("convert", "--torch-path", parts.checkpoint, "--mlx-path", path, *more)
        config = model_forms.config(hidden_dim=128, vocab_size=320)
        return Given(str(path), path, config, model_forms.read_folder(path))

    return make


def meta(parts: Parts) -> Given:
    """As it is, unconverted."""
    found = torch.load(parts.checkpoint / "consolidated.00.pth", weights_only=True)
    weights = {name: weight.double() for name, weight in found.items()}
    config = model_forms.config(hidden_dim=128, vocab_size=320)
    return Given(str(parts.checkpoint), parts.checkpoint, config, weights)


def hf(**arguments: Any) -> Make:
    def make(parts: Parts) -> Given:
        path, config = parts.folder / "hf", model_forms.config()
        return Given(str(path), path, config, model_forms.write_hf(path, config, **arguments))

    return make


def mistral(parts: Parts) -> Given:
    path, config = parts.folder / "mistral", model_forms.config(vocab_size=320)
    return Given(str(path), path, config, model_forms.write_mistral(path, config, parts.tokenizer))


def gguf(*kinds: str, tied: bool = True, **sizes: int) -> Make:
    def make(parts: Parts) -> Given:
        path, config = parts.folder / "model.gguf", model_forms.config(vocab_size=GGUF_VOCAB, **sizes)
        return Given(str(path), path, config, model_forms.write_gguf(path, config, kinds, tied=tied))

    return make


def shipped(parts: Parts) -> Given:
    """A distribution that is nothing but a model, and cannot be imported."""
    package, info = parts.folder / "site/acme_tiny", parts.folder / "site/acme_tiny-1.2.dist-info"
    for folder in (package, info):
        folder.mkdir(parents=True)
    given = gguf("Q4_1")(Parts(package, parts.run, parts.checkpoint, parts.tokenizer))
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-tiny\nVersion: 1.2\n")
    (info / "RECORD").write_text("acme_tiny/model.gguf,,\nacme_tiny/__init__.py,,\n")
    variables = {"PYTHONPATH": str(parts.folder / "site")}
    return Given("package:acme-tiny/model.gguf", given.path, given.config, given.weights, variables)


def on_the_hub(parts: Parts) -> Given:
    """Fetched once; after that the cache has it, and there is no Hub."""
    pytest.importorskip("huggingface_hub", reason="needs the extra hub: pip install 'mlxlora[hub]'")
    given = hf(dtype=torch.bfloat16, shards=2)(parts)
    variables = {"HF_HOME": str(parts.folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
    with serving() as hub:
        commit = hub.put("org/tiny", {path.name: path.read_bytes() for path in given.path.iterdir()})
        fetch = {**variables, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        parts.run("generate", "--model", "org/tiny", "-p", "A", "-n", 1, environ=fetch)
    (path,) = (parts.folder / "cache").rglob(commit)
    return Given("org/tiny", path, given.config, given.weights, variables | {"HF_HUB_OFFLINE": "1"})


MIXED: Bits = {
    "model.embed_tokens": (64, 8),
    "model.layers.0.self_attn.q_proj": (64, 6),
    "model.layers.0.mlp.up_proj": (32, 3),
    "model.layers.1.self_attn.k_proj": (32, 5),
    "model.layers.1.self_attn.o_proj": (0, 0),
    "lm_head": (0, 0),
}
KINDS: dict[str, Make] = {
    "own": own("--dtype", "float32"),
    "own, 4 bits": own("-q", "--q-group-size", 32),
    "own, 8 bits": own("-q", "--q-bits", 8, "--dtype", "bfloat16"),
    "hf": hf(),
    "hf, tied, shards": hf(tied=True, shards=3),
    "hf, bfloat16, tied": hf(dtype=torch.bfloat16, tied=True),
    "hf, bfloat16, shards": hf(dtype=torch.bfloat16, shards=2),
    "mlx-lm, 4 bits": hf(dtype=torch.float16, tied=True, bits={}),
    "mlx-lm, a table of bits": hf(dtype=torch.bfloat16, shards=2, bits=MIXED),
    "mistral": mistral,
    "meta": meta,
    "gguf, F16": gguf("F16"),
    "gguf, Q4_0": gguf("Q4_0"),
    "gguf, Q8_0": gguf("Q8_0", tied=False),
    "gguf, a mixture": gguf("Q8_0", "Q4_K", "Q6_K", "Q5_K", "Q5_0", dim=256, hidden_dim=256, n_layers=1),
    "package": shipped,
    "hub": on_the_hub,
}
#: kinds that a recipe converts too: how they are read is the same, so one of each loader and name is enough
CONVERTED = (
    "hf, bfloat16, shards",
    "mlx-lm, a table of bits",
    "mistral",
    "gguf, a mixture",
    "package",
    "hub",
)
#: kinds that are computed with the BLAS of the runtime, which checks itself in a tenth of a second
WITH_RUNTIME = ("own, 4 bits", "hf", "gguf, Q4_0")


@dataclass(frozen=True)
class Bench:
    """A model of some kind, an adapter that was trained on it, and a way to run command lines.

    Attributes:
        kind: of the model.
        given: the model.
        folder: the working folder, in which ``data`` lies.
        adapter: trained without being disturbed.
        command: starts ``mlxlora`` with arguments.
    """

    kind: str
    given: Given
    folder: Path
    adapter: Path
    command: Callable[..., Done]

    def run(self, *arguments: object) -> Done:
        """Run a command line that must succeed."""
        done = self.command(*arguments)
        assert done.returncode == 0, done.stderr
        return done

    def train(self, adapter: Path) -> list[object]:
        """The command line that trains."""
        return [*TRAIN, "--model", self.given.named, "--data", "data", "--adapter-file", adapter]

    def adapted(self) -> Weights:
        """What base and adapter file come to."""
        return model_forms.adapted(self.given.weights, self.adapter, SCALE)


def write_rows(folder: Path) -> Path:
    folder.mkdir()
    texts = LINES[1:17]
    for name, part in (("train", texts[:10]), ("valid", texts[10:13]), ("test", texts[13:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def bench(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    warm: Warm,
    make_checkpoint: Callable[..., Path],
    tiny_tokenizer: Path,
) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("kind")
    plain = {**os.environ, "MLXLORA_THREADS": "1", "MLXLORA_PLUGINS": ""}
    write_rows(folder / "data")
    (folder / "killer.py").write_text(KILLER)

    def run(*arguments: object, environ: dict[str, str] | None = None) -> Done:
        done = warm.run(*arguments, "-P", "no:openblas", cwd=folder, environ=plain | (environ or {}))
        assert done.returncode == 0, done.stderr
        return done

    checkpoint = make_checkpoint(folder / "checkpoint", dim=64)
    given = KINDS[request.param](Parts(folder, run, checkpoint, tiny_tokenizer))

    without = () if request.param in WITH_RUNTIME else ("-P", "no:openblas")

    def command(*arguments: object) -> Done:
        return warm.run(*arguments, *without, cwd=folder, environ=plain | given.variables)

    made = Bench(request.param, given, folder, folder / "a.safetensors", command)
    made.run(*made.train(made.adapter))
    yield made


def test_a_killed_training_goes_on_to_the_same_adapter(bench: Bench) -> None:
    adapter = bench.folder / "killed" / "a.safetensors"
    adapter.parent.mkdir()
    killed = bench.command(*bench.train(adapter), "-P", "./killer.py", "--observer", "killer")
    assert killed.returncode == -9 and not adapter.exists(), killed.stderr
    assert (adapter.parent / "a.checkpoints").is_dir()
    resumed = bench.run(*bench.train(adapter), "--resume")
    assert f"of {STEPS}" in resumed.stderr and "resumed at step" in resumed.stderr
    assert adapter.read_bytes() == bench.adapter.read_bytes()


def far(got: Any, want: torch.Tensor) -> float:
    """How far apart, as a part of the largest number."""
    exact = want.numpy()
    return float(np.abs(np.array(got, np.float64) - exact).max() / np.abs(exact).max())


def opened(path: Path, adapter: Path | None = None) -> loading.Model:
    model = loading.load(path, REGISTRY)
    if adapter is not None:
        adapters.load(adapter, model, REGISTRY)
    return model


def logits(model: loading.Model, ids: list[int]) -> np.ndarray[Any, Any]:
    return np.array(model.module(mx.array([ids]))[0].astype(mx.float32))


def test_what_it_computes_with_the_adapter_is_what_torch_does(bench: Bench) -> None:
    """Logits, the loss that evaluate tells, and the text that generate does."""
    given, weights = bench.given, bench.adapted()
    model = opened(given.path, bench.adapter)
    on_base = ("--model", given.named, "--adapter-file", bench.adapter)
    told = json.loads(bench.run("evaluate", *on_base, "--data", "data", "--json").stdout)
    nats, counted = 0.0, 0
    for line in (bench.folder / "data" / "test.jsonl").read_text().splitlines():
        ids = model.tokenizer.encode(json.loads(line)["text"], eos=True)
        want = llama_torch.logits(weights, torch.tensor([ids]), given.config)[0]
        assert far(logits(model, ids), want) < 1e-5
        base = llama_torch.logits(given.weights, torch.tensor([ids]), given.config)[0]
        assert far(base.numpy(), want) > 1e-2, "or the adapter does nothing"
        nats += float(torch.nn.functional.cross_entropy(want[:-1], torch.tensor(ids[1:]), reduction="sum"))
        counted += len(ids) - 1
    assert told["tokens"] == counted and told["loss"] == pytest.approx(nats / counted, rel=1e-6)

    said = bench.run("generate", *on_base, "-p", PROMPT, "-n", 5, "--temp", 0, "--json")
    head = weights.get("output.weight", weights["tok_embeddings.weight"])
    said_by = weights | {"output.weight": head[: model.tokenizer.vocab_size]}  # padding is never drawn
    drawn = llama_torch.greedy(said_by, model.tokenizer.encode(PROMPT), 5, given.config)
    stop = next((at for at, token in enumerate(drawn) if token in model.tokenizer.stops), 5)
    assert json.loads(said.stdout)["text"] == model.tokenizer.decode(drawn[:stop])


def rounding(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a number of a type may be from the one that it stands for."""
    kind = torch.finfo(dtype)
    return torch.maximum(weight.abs() * kind.eps / 2, torch.tensor(kind.smallest_normal, dtype=torch.float64))


def bound(folder: Path, name: str, want: torch.Tensor) -> torch.Tensor:
    """How far a fused weight may be from base and adapter: docs/kinds/quantizers.md, of each weight."""
    tensors = load_file(folder / "model.safetensors")
    path = name.removesuffix(".weight")
    if f"{path}.scales" not in tensors:
        return rounding(want, tensors[name].dtype) + 1e-6 * want.abs().max()
    stated = json.loads((folder / "config.json").read_text())
    options = stated["quantization"] | stated["quantized"][path]
    scales = tensors[f"{path}.scales"]
    scale = scales.double().abs().repeat_interleave(options["group_size"], -1)
    return scale + (2 ** options["bits"] + 1) * rounding(scale, scales.dtype) + 1e-6


def test_what_is_fused_is_base_and_adapter(bench: Bench) -> None:
    """The packed ones within the documented bound of a step of the grid, dense ones to a rounding."""
    given, want = bench.given, bench.adapted()
    on_base = ("--model", given.named, "--adapter-file", bench.adapter)
    ways: dict[str, tuple[str, ...]] = {"fused": ()}
    if opened(given.path).quantization is not None:
        ways["dense"] = ("--dequantize",)
    for name, more in ways.items():
        folder = bench.folder / name
        report = json.loads(bench.run("fuse", *on_base, "--save-path", name, "--json", *more).stdout)
        found = model_forms.read_folder(folder)
        assert found.keys() == want.keys()
        for path, weight in want.items():
            away = (found[path] - weight).abs()
            if weight.equal(given.weights[path]) and not more:
                assert not away.any(), path
            assert (away <= bound(folder, path, weight)).all(), path
        model = opened(folder)
        ids = model.tokenizer.encode(LINES[20])
        ours = logits(model, ids)
        assert far(ours, llama_torch.logits(found, torch.tensor([ids]), given.config)[0]) < 1e-5
        both = llama_torch.logits(want, torch.tensor([ids]), given.config)[0].numpy()
        distance = float(np.linalg.norm(ours - both) / np.linalg.norm(both))
        assert report["distance"] / 4 <= distance + 1e-6 and distance <= 4 * report["distance"] + 1e-6
        if not report["rounded"]:
            types = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
            assert report["distance"] < max(map(NEAR.__getitem__, types))


def test_a_recipe_that_names_it(bench: Bench) -> None:
    """The same adapter as train gives, whether the run converts the model or takes it as it is."""
    for key in ("mlx_path", "torch_path") if bench.kind in CONVERTED else ("mlx_path",):
        recipe = bench.folder / f"{key}.toml"
        dtype = 'dtype = "stored"' if key == "torch_path" else ""
        stated = {"folder": key, "key": key, "model": bench.given.named, "dtype": dtype}
        recipe.write_text(RECIPE.format(**stated, steps=STEPS, prompt=PROMPT))
        done = bench.run("run", recipe)
        assert "held-out loss (test" in done.stdout and PROMPT in done.stdout
        trained, want = (load_file(file) for file in (bench.folder / key / ADAPTER, bench.adapter))
        assert trained.keys() == want.keys()
        assert all(torch.equal(trained[name], want[name]) for name in want)
    again = bench.run("run", bench.folder / "mlx_path.toml").stderr
    assert [again.count(f"[{stage}] done already") for stage in STAGES] == [1] * len(STAGES), again
