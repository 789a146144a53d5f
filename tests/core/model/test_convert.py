from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxlora_core.errors import ModelError, PluginError, ResourceError, SafetyError, UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.model import folder as folders
from mlxlora_core.model import loading
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.model.generate import decode, generate
from mlxlora_core.model.linears import dense_weight, linears
from mlxlora_core.model.weights import WEIGHTS
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.specs import TokenizerLoader, WeightLoader
from mlxlora_core.values import ForeignModel, LazyTensor

MakeCheckpoint = Callable[..., Path]
MakeModel = Callable[..., Path]


def theirs(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(checkpoint / "consolidated.00.pth", weights_only=True)
    return tensors


def change(checkpoint: Path, **tensors: torch.Tensor | None) -> Path:
    """Put tensors in place of others in a checkpoint; ``__`` in a name is a dot, None takes one away."""
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    merged = {k: v for k, v in (theirs(checkpoint) | new).items() if v is not None}
    torch.save(merged, checkpoint / "consolidated.00.pth")
    return checkpoint


def affine(registry: Registry, **options: Any) -> Quantization:
    component = registry.find("quantizer", "affine")
    return Quantization(Choice(component, component.spec.options(**options)))


def weights(folder: Path) -> dict[str, mx.array]:
    (name,) = {path.name for path in folder.iterdir()} & set(WEIGHTS.values())
    return tensor_file.load(folder / name)[0]


def clean(folder: Path, *kept: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)


# --- values -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "file_format"),
    [
        ("float16", "safetensors"),
        ("bfloat16", "safetensors"),
        ("float32", "safetensors"),
        ("float16", "npz"),
        ("float32", "npz"),
    ],
)
def test_values_are_the_checkpoint_s_in_the_type_asked_for(
    tiny_checkpoint: Path, model_folder: MakeModel, dtype: str, file_format: str
) -> None:
    folder = model_folder(dtype=dtype, file_format=file_format)
    got, want = weights(folder), theirs(tiny_checkpoint)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        cast = tensor.to(getattr(torch, dtype))
        assert got[name].dtype == getattr(mx, dtype), name
        assert (
            bytes(memoryview(got[name].reshape(-1).view(mx.uint8)))
            == cast.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ), name
    assert (folder / "tokenizer.model").read_bytes() == (tiny_checkpoint / "tokenizer.model").read_bytes()
    clean(folder, "config.json", "tokenizer.model", WEIGHTS[file_format])


def test_bfloat16_in_npz_is_refused_at_once(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="npz cannot hold bfloat16"):
        result_of(convert(tiny_checkpoint, tmp_path / "model", registry, dtype="bfloat16", file_format="npz"))
    clean(tmp_path)


@pytest.mark.parametrize("bits", [None, 4])
def test_both_formats_have_one_fingerprint(
    model_folder: MakeModel, registry: Registry, bits: int | None
) -> None:
    models = [
        loading.load(model_folder(dtype="float16", file_format=f, bits=bits), registry)
        for f in ("safetensors", "npz")
    ]
    assert models[0].fingerprint == models[1].fingerprint
    assert models[0].fingerprint != loading.load(model_folder(dtype="float32"), registry).fingerprint


def test_config_holds_what_the_model_is_and_nothing_else(
    tiny_checkpoint: Path, model_folder: MakeModel
) -> None:
    stated = json.loads((tiny_checkpoint / "params.json").read_text())
    assert stated["multiple_of"] == 32 and stated["vocab_size"] == -1
    config = json.loads((model_folder() / "config.json").read_text())
    assert (
        config.items()
        >= {
            "model_type": "llama",
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "head_dim": 8,
            "hidden_dim": 64,
            "norm_eps": 1e-5,
            "vocab_size": 320,
        }.items()
    )
    assert not config.keys() & {"multiple_of", "quantization", "quantizer"}
    packed = json.loads((model_folder(bits=4) / "config.json").read_text())
    assert packed.pop("quantization") == {"group_size": 32, "bits": 4}
    assert packed.pop("quantizer") == "affine:affine"
    assert packed.pop("quantized") == {
        path.removesuffix(".scales"): {} for path in weights(model_folder(bits=4)) if path.endswith(".scales")
    }
    assert packed == config


def test_the_same_checkpoint_gives_the_same_bytes(
    tiny_checkpoint: Path, model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    ways: tuple[dict[str, Any], ...] = ({}, {"file_format": "npz"})
    for options in ways:
        first = model_folder(dtype="float16", **options)
        result_of(convert(tiny_checkpoint, tmp_path / "again", registry, overwrite=True, **options))
        for path in first.iterdir():
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


# --- quantized ----------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["safetensors", "npz"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_linear_but_the_head_is_quantized_and_reads_back_as_packed(
    model_folder: MakeModel, registry: Registry, bits: int, file_format: str
) -> None:
    dense = weights(model_folder(dtype="float16"))
    folder = model_folder(dtype="float16", bits=bits, file_format=file_format)
    model = loading.load(folder, registry)
    found = dict(linears(model.module))
    assert len(found) == 15
    for path, linear in found.items():
        weight = dense[f"{path}.weight"]
        got = dense_weight(linear)
        if path == "output":
            assert mx.array_equal(got, weight.astype(mx.float32))
            continue
        parts = mx.quantize(weight, group_size=32, bits=bits)
        want = mx.dequantize(*(p if p.dtype == mx.uint32 else p.astype(mx.float32) for p in parts), 32, bits)
        assert mx.allclose(got, want, rtol=1e-6, atol=1e-7), path
        # One step of a group's scale at most lies between a weight and its packed value.
        steps = mx.repeat(parts[1].astype(mx.float32), 32, axis=1)
        assert (mx.abs(got - weight) <= mx.abs(steps)).all(), path
    stored = weights(folder)
    assert stored["output.weight"].dtype == mx.float16
    assert stored["layers.0.attention.wq.weight"].dtype == mx.uint32
    assert stored["layers.0.attention.wq.scales"].dtype == mx.float16


def test_the_head_is_quantized_when_asked(model_folder: MakeModel, registry: Registry) -> None:
    assert "output.scales" in weights(model_folder(bits=4, head=True))
    loading.load(model_folder(bits=4, head=True), registry)


def test_the_report_has_the_sizes_and_the_error(
    make_checkpoint: MakeCheckpoint, registry: Registry, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dim=96)
    report = result_of(
        convert(
            checkpoint, tmp_path / "model", registry, quantization=affine(registry, group_size=64, bits=4)
        )
    )
    # 96 and 192 inputs: only 192 divides by 64.
    assert report.quantized == 2
    assert len(report.left_dense) == 12 and "layers.0.attention.wq" in report.left_dense
    assert report.parameters == sum(tensor.numel() for tensor in theirs(checkpoint).values())
    stored = weights(tmp_path / "model")
    assert report.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert report.bits_per_weight == pytest.approx(report.bytes * 8 / report.parameters)
    squared = [0.0, 0.0]
    for path in ("layers.0.feed_forward.w2", "layers.1.feed_forward.w2"):
        exact = theirs(checkpoint)[f"{path}.weight"].float().numpy()
        packed = (stored[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
        rounded = mx.dequantize(*(p if p.dtype == mx.uint32 else p.astype(mx.float32) for p in packed), 64, 4)
        squared[0] += float(((np.array(rounded) - exact) ** 2).sum())
        squared[1] += float((exact**2).sum())
    assert report.relative_error == pytest.approx((squared[0] / squared[1]) ** 0.5, rel=1e-4)
    assert 0.01 < report.relative_error < 0.2
    loading.load(tmp_path / "model", registry)


# --- the target ---------------------------------------------------------------


def test_a_target_is_only_replaced_when_it_is_ours_and_the_caller_agrees(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    result_of(convert(tiny_checkpoint, target, registry))
    before = (target / "model.safetensors").stat().st_ino
    with pytest.raises(SafetyError, match=r"there already.*--overwrite"):
        result_of(convert(tiny_checkpoint, target, registry))
    assert (target / "model.safetensors").stat().st_ino == before
    result_of(convert(tiny_checkpoint, target, registry, file_format="npz", overwrite=True))
    clean(target, "config.json", "tokenizer.model", "weights.npz")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(SafetyError, match="something else"):
        result_of(convert(tiny_checkpoint, target, registry, overwrite=True))
    assert (target / "notes.txt").read_text() == "mine"
    assert SafetyError.exit_code == 5


def test_a_target_is_refused_before_the_checkpoint_is_opened(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path
) -> None:
    def never(folder: Path) -> dict[str, LazyTensor]:
        raise AssertionError

    (tmp_path / "notes").write_text("")
    with pytest.raises(SafetyError, match="something else"):
        result_of(convert(tiny_checkpoint, tmp_path, with_loader(registry, never), loader="other"))


def test_the_checkpoint_itself_is_no_target(
    make_checkpoint: MakeCheckpoint, registry: Registry, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(SafetyError):
        result_of(convert(checkpoint, checkpoint, registry, overwrite=True))
    clean(checkpoint, "consolidated.00.pth", "params.json", "tokenizer.model")


# --- bad checkpoints ----------------------------------------------------------


def refused(checkpoint: Path, registry: Registry, error: type[Exception] = ModelError, **options: Any) -> str:
    """The message that a conversion stops with, which leaves nothing behind."""
    target = checkpoint.parent / "out" / "model"
    with pytest.raises(error) as caught:
        result_of(convert(checkpoint, target, registry, **options))
    if target.parent.exists():
        clean(target.parent)
    return str(caught.value)


def test_everything_missing_unknown_and_misshapen_is_told_at_once(
    make_checkpoint: MakeCheckpoint, registry: Registry, tmp_path: Path
) -> None:
    checkpoint = change(
        make_checkpoint(tmp_path / "checkpoint"),
        layers__1__attention__wo__weight=None,
        norm__weight=None,
        extra__weight=torch.zeros(1).half(),
        layers__0__attention__wq__weight=torch.zeros(32, 31).half(),
    )

    def whole_numbers(folder: Path) -> dict[str, LazyTensor]:
        tensors = lazy(folder)
        name = "layers.1.ffn_norm.weight"
        return tensors | {name: LazyTensor((32,), "int32", tensors[name].read)}

    message = refused(checkpoint, with_loader(registry, whole_numbers), loader="other")
    for part in (
        "2 missing: layers.1.attention.wo.weight, norm.weight",
        "1 unknown: extra.weight",
        "1 of a wrong shape: layers.0.attention.wq.weight is (32, 31), wanted (32, 32)",
        "1 of a wrong type: layers.1.ffn_norm.weight is int32, wanted float32",
    ):
        assert part in message


def test_values_that_float16_cannot_hold_are_refused(
    make_checkpoint: MakeCheckpoint, registry: Registry, tmp_path: Path
) -> None:
    weight = torch.ones(32, 32)
    weight[3, 4] = 70000.0
    checkpoint = change(make_checkpoint(tmp_path / "checkpoint"), layers__0__attention__wo__weight=weight)
    message = refused(checkpoint, registry)
    assert "layers.0.attention.wo.weight has values that are not finite as float16" in message
    assert "bfloat16 or float32" in message
    result_of(convert(checkpoint, tmp_path / "model", registry, dtype="bfloat16"))
    weight[3, 4] = float("nan")
    change(checkpoint, layers__0__attention__wo__weight=weight)
    message = refused(checkpoint, with_loader(registry, lazy), loader="other", dtype="float32")
    assert "not finite as float32" in message


def test_impossible_values_and_a_tokenizer_of_another_vocabulary_are_refused(
    make_checkpoint: MakeCheckpoint, registry: Registry, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", params={"dim": -1, "n_heads": "4"})
    message = refused(checkpoint, registry)
    assert (
        message.startswith(f"{checkpoint}: ")
        and "dim: must be at least 1 and at most 1048576, got -1" in message
        and "n_heads: wanted integer, got '4'" in message
    )
    head = torch.zeros(319, 32).half()
    names = {"tok_embeddings__weight": head, "output__weight": head}
    checkpoint = change(make_checkpoint(tmp_path / "checkpoint"), **names)
    assert "tokenizer has 320 pieces, the model a vocabulary of 319" in refused(checkpoint, registry)


class Watched:
    """A tokenizer that keeps the ids that it is given to decode."""

    def __init__(self, tokenizer: Any, seen: list[int]) -> None:
        self._tokenizer, self._seen = tokenizer, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def stream(self, ids: Iterator[int], every: int = 1) -> Iterator[str]:
        for token in ids:
            self._seen.append(token)
        yield "seen"


def test_a_vocabulary_may_be_padded(
    make_checkpoint: MakeCheckpoint, registry: Registry, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    embedding, head = (torch.randn(324, 32, generator=draw).half() for _ in range(2))
    head[320:322], head[322:] = 100, -100  # one of them wins, whatever comes before
    names = {"tok_embeddings__weight": embedding, "output__weight": head}
    checkpoint = change(make_checkpoint(tmp_path / "checkpoint"), **names)
    assert result_of(convert(checkpoint, tmp_path / "model", registry)).padding == 4
    model = loading.load(tmp_path / "model", registry)
    assert (model.language_model.vocab_size, model.tokenizer.vocab_size) == (324, 320)
    assert model.language_model(mx.array([[1, 5, 7]])).argmax(-1).min() >= 320
    for sampler, options in (("greedy", {}), ("temperature", {"temp": 1.5}), ("top-p", {})):
        component = registry.find("sampler", sampler)
        chosen = [(component, component.spec.options(**options))]
        seen: list[int] = []
        watched = Watched(model.tokenizer, seen)
        list(generate(model.language_model, watched, "A layer", chosen, num_tokens=40, seed=3))
        assert seen and max(seen) < 320
    drawn = iter([40, 323, 41])
    ids = decode(model.language_model, [1, 5], lambda logits, tokens: next(drawn), num_tokens=3, stops={2})
    assert "".join(model.tokenizer.stream(ids)) == model.tokenizer.decode([40, 41])


def test_a_folder_that_no_loader_knows_is_refused(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "no weight loader knows this folder" in refused(tmp_path / "folder", registry)
    (tmp_path / "file").write_text("")
    assert "no weight loader knows this file" in refused(tmp_path / "file", registry)
    assert "there is no such folder or file" in refused(tmp_path / "absent", registry)
    assert "no loader 'nothing'" in refused(tmp_path / "folder", registry, PluginError, loader="nothing")


def test_a_disk_that_is_too_small_is_told_before_any_work(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=60_000))
    with pytest.raises(ResourceError, match=r"model: 0\.16 MB of disk are needed, 0\.06 MB are free"):
        result_of(convert(tiny_checkpoint, tmp_path / "model", registry, dtype="float32"))
    clean(tmp_path)
    # What a quantizer will make of the linears is not known before; it may well fit.
    result_of(
        convert(
            tiny_checkpoint,
            tmp_path / "model",
            registry,
            quantization=affine(registry, group_size=32, bits=2),
        )
    )


# --- loaders of others --------------------------------------------------------


def with_loader(registry: Registry, read: Callable[[Path], dict[str, Any]], detect: bool = True) -> Registry:
    """The registry with a loader ``other`` that makes its tensors with ``read``."""

    def open_(folder: Path, options: Any) -> ForeignModel:
        config = json.loads((folder / "params.json").read_text())
        return ForeignModel(config, {"tokenizer.model": folder / "tokenizer.model"}, read(folder))

    spec = WeightLoader(name="other", summary="", detect=lambda folder: detect, open=open_)
    other = Component("loader", spec, registry.find("loader", "torch-pth").plugin)
    return Registry(registry.plugins, [*registry.components, other])


def lazy(folder: Path) -> dict[str, LazyTensor]:
    def reader(tensor: torch.Tensor) -> Callable[[], mx.array]:
        return lambda: mx.array(tensor.numpy())

    return {name: LazyTensor(tuple(t.shape), "float16", reader(t)) for name, t in theirs(folder).items()}


def test_two_loaders_that_know_a_folder_must_be_told_apart(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path
) -> None:
    both = with_loader(registry, lazy)
    with pytest.raises(ModelError, match=r"torch:torch-pth, torch:other can read this.*--loader torch:torch"):
        result_of(convert(tiny_checkpoint, tmp_path / "model", both))
    assert (
        result_of(convert(tiny_checkpoint, tmp_path / "model", both, loader="other")).loader == "torch:other"
    )


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError, ModelError])
def test_an_interrupted_conversion_leaves_nothing_and_is_not_disguised(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path, fault: type[BaseException]
) -> None:
    def broken(folder: Path) -> dict[str, LazyTensor]:
        def fail() -> mx.array:
            raise fault("while reading")

        tensors = lazy(folder)
        last = list(tensors)[-1]
        return tensors | {last: LazyTensor(tensors[last].shape, "float16", fail)}

    expected = ModelError if fault is OSError else fault
    with pytest.raises(expected, match="while reading"):
        result_of(convert(tiny_checkpoint, tmp_path / "model", with_loader(registry, broken), loader="other"))
    clean(tmp_path)


def test_tensors_are_read_one_after_another_and_let_go(
    make_checkpoint: MakeCheckpoint, registry: Registry, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dim=256, n_layers=6)
    alive: list[int] = []

    def counted(folder: Path) -> dict[str, LazyTensor]:
        def reader(name: str, tensor: LazyTensor) -> Callable[[], mx.array]:
            def read() -> mx.array:
                alive.append(mx.get_active_memory())
                return tensor.read()

            return read

        return {name: LazyTensor(t.shape, t.dtype, reader(name, t)) for name, t in lazy(folder).items()}

    largest = 512 * 256 * 4
    for quantization in (None, affine(registry, group_size=32, bits=4)):
        alive.clear()
        result_of(
            convert(
                checkpoint,
                tmp_path / "model",
                with_loader(registry, counted),
                loader="other",
                dtype="float32",
                quantization=quantization,
                overwrite=True,
            )
        )
        assert len(alive) == 58, "the smallest is read before, to see what the loader takes"
        assert max(alive) - alive[0] < largest


def test_a_loader_may_read_one_file(tiny_checkpoint: Path, registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "model.one"
    file.write_text("all in here")

    def open_(path: Path, options: Any) -> ForeignModel:
        assert path == file
        config = json.loads((tiny_checkpoint / "params.json").read_text())
        return ForeignModel(config, {"words.bin": tiny_checkpoint / "tokenizer.model"}, lazy(tiny_checkpoint))

    loader = WeightLoader(name="one", summary="s", detect=lambda path: path.suffix == ".one", open=open_)
    words = TokenizerLoader(
        name="words",
        summary="s",
        detect=lambda files: "words.bin" in files,
        open=lambda files, options: registry.find("tokenizer", "sentencepiece").spec.open(
            {"tokenizer.model": files["words.bin"]}, options
        ),
    )
    plugin = registry.find("loader", "torch-pth").plugin
    more = [Component("loader", loader, plugin), Component("tokenizer", words, plugin)]
    both = Registry(registry.plugins, [*registry.components, *more])
    report = result_of(convert(file, tmp_path / "model", both))
    assert report.loader == "torch:one"
    clean(tmp_path / "model", "config.json", "model.safetensors", "words.bin")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tokenizer_files"] == ["words.bin"]
    model = loading.load(tmp_path / "model", both)
    assert model.tokenizer.decode(model.tokenizer.encode("the weights")) == "the weights"
    assert folders.holds_only_a_model(tmp_path / "model")
    assert [path.name for path in folders.files(tmp_path / "model")][1] == "words.bin"


ODD_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "no mapping of files": ({"tokenizer": Path("tokenizer.model")}, "tokenizer of type PosixPath"),
    "a file elsewhere": ({"tokenizer": {"../x": Path("x")}}, "a tokenizer file '../x'"),
    "a file of the model": (
        {"tokenizer": {"config.json": Path("x")}},
        "tokenizer file 'config.json'",
    ),
    "a name for a path": ({"tokenizer": {"x": "x"}}, "x of type str, wanted a path, or contents"),
    "arrays": ({"tensors": {"a": 1}}, "gives int, wanted LazyTensor"),
    "a list of tensors": ({"tensors": []}, "tensors of type list"),
    "no config": ({"config": None}, "config of type NoneType"),
}


@pytest.mark.parametrize(("changes", "says"), ODD_MODELS.values(), ids=ODD_MODELS)
def test_a_loader_that_breaks_the_contract_is_named(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    good = {"config": {}, "tokenizer": {"t": Path("t")}, "tensors": {}}
    spec = WeightLoader(
        name="odd", summary="s", detect=lambda path: True, open=lambda *_: ForeignModel(**good | changes)
    )
    plugin = registry.find("loader", "torch-pth").plugin
    odd = Registry(registry.plugins, [*registry.components, Component("loader", spec, plugin)])
    with pytest.raises(PluginError) as caught:
        result_of(convert(tiny_checkpoint, tmp_path / "model", odd, loader="odd"))
    assert caught.value.what.startswith("loader torch:odd: open gives ") and says in caught.value.what
    clean(tmp_path)


def test_tensors_that_the_model_has_no_use_for_are_told(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path
) -> None:
    def doubled(folder: Path) -> dict[str, LazyTensor]:
        tensors = lazy(folder)
        return tensors | {"rope.freqs": tensors["norm.weight"]}

    report = result_of(
        convert(tiny_checkpoint, tmp_path / "model", with_loader(registry, doubled), loader="other")
    )
    assert report.left_out == ("rope.freqs",)
    assert result_of(convert(tiny_checkpoint, tmp_path / "plain", registry)).left_out == ()


# --- kills --------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from mlxlora_core import plugins as registry
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of

source, target = map(Path, sys.argv[1:3])
plugins = registry.load(environ={"MLXLORA_PLUGINS": ""})

def count(event, arguments):
    if event == sys.argv[3] and ".model." in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
result_of(convert(source, target, plugins))
"""


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_killed_while_it_writes_there_is_no_target_and_the_next_try_succeeds(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path, event: str
) -> None:
    target = tmp_path / "model"
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(target), event]
    assert subprocess.run(command, timeout=60).returncode == -9
    assert not target.exists() and any(tmp_path.iterdir())
    result_of(convert(tiny_checkpoint, target, registry))
    clean(tmp_path, "model")
    loading.load(target, registry)


@pytest.fixture(autouse=True)
def _fresh_memory() -> Iterator[None]:
    mx.clear_cache()
    yield
