"""Exporting: what an exporter is given, what it may leave, and what comes of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxlora_core
from mlxlora_core import cli
from mlxlora_core.errors import MlxloraError, ModelError, PluginError, ResourceError, SafetyError, UsageError
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.events import result_of
from mlxlora_core.model.export import ExportReport, export, holds_only_an_export
from mlxlora_core.model.fuse import fuse
from mlxlora_core.model.several import AdapterShare
from mlxlora_core.model.weights import read_weights
from mlxlora_core.plugins import Choice, Component, Plugin, Registry
from mlxlora_core.specs import Exporter, NoOptions
from mlxlora_core.values import ExportSource
from mlxlora_core.version import __version__

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 5, 7, 9, 300, 17, 44, 45]])


def exported(
    base: Path, target: Path, registry: Registry, adapter: Path | None = None, **options: Any
) -> ExportReport:
    """Export by ``npz``."""
    npz = registry.find("exporter", "npz")
    fused = AdapterFile(adapter) if adapter else None
    return result_of(export(base, target, Choice(npz, npz.spec.options(**options)), registry, fused=fused))


def by(function: Callable[[ExportSource, Path, Any], Any]) -> Choice:
    """An exporter of somebody else."""
    spec = Exporter(name="odd", summary="s", export=function)
    return Choice(Component("exporter", spec, Plugin("odd", "odd", "1", "installed", "odd")), NoOptions())


def numbers(folder: Path) -> dict[str, np.ndarray]:
    """What numpy, which knows nothing of mlxlora, reads."""
    with np.load(folder / "weights.npz", allow_pickle=False) as archive:
        return dict(archive)


def stored(folder: Path) -> dict[str, mx.array]:
    """What the model folder holds."""
    return {name: tensor.read() for name, tensor in read_weights(folder)[0].items()}


def logits(folder: Path, registry: Registry, adapter: Path | None = None) -> mx.array:
    model = loading.load(folder, registry)
    if adapter is not None:
        adapters.load(adapter, model, registry)
    return model.language_model(TOKENS)


def apart(got: mx.array, want: mx.array) -> float:
    return float(mx.linalg.norm((got - want).reshape(-1)) / mx.linalg.norm(want.reshape(-1)))


@pytest.fixture
def make_adapter(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A function that trains all linears of a base for three large steps."""

    def make(base: Path) -> Path:
        path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
        command = ["train", "--model", base, "--data", tiny_data, "--adapter-file", path]
        command += ["--set", "adapter.targets=all-linear", "--iters", 3, "--learning-rate", 0.05]
        assert cli.execute(list(map(str, command))) == 0
        return path

    return make


# --- what numpy finds ---------------------------------------------------------


@pytest.mark.parametrize(("dtype", "file_format"), [("float16", "safetensors"), ("float32", "npz")])
def test_a_dense_model_comes_out_as_it_went_in(
    model_folder: MakeModel, registry: Registry, tmp_path: Path, dtype: str, file_format: str
) -> None:
    base = model_folder(dtype=dtype, file_format=file_format)
    report = exported(base, tmp_path / "out", registry)
    found, want = numbers(tmp_path / "out"), stored(base)
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[n], np.array(want[n])) and found[n].dtype == dtype for n in found)
    assert sum(array.size for array in found.values()) == report.parameters
    assert (report.tensors, report.adapter, report.exporter) == (len(found), "", "npz:npz")
    assert set(report.files) == {"weights.npz", "config.json", "tokenizer.model"}


def test_an_adapter_is_in_the_weights_as_fuse_puts_it_there(
    model_folder: MakeModel, make_adapter: Callable[[Path], Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder(dtype="float16")
    adapter = make_adapter(base)
    result_of(fuse(base, [AdapterShare(AdapterFile(adapter))], tmp_path / "fused", registry))
    report = exported(base, tmp_path / "out", registry, adapter)
    found, want = numbers(tmp_path / "out"), stored(tmp_path / "fused")
    assert report.adapter == "lora:lora"
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[name], np.array(want[name])) for name in found)
    # And one weight by numpy alone: W + scale (A B)^T, rounded once.
    name = "layers.1.feed_forward.w2"
    loaded: Any = mx.load(str(adapter))
    held = {key: np.array(value) for key, value in loaded.items()}
    update = 2.0 * (held[f"{name}.lora_a"].astype(float) @ held[f"{name}.lora_b"].astype(float)).T
    dense = np.array(stored(base)[f"{name}.weight"]).astype(float)
    assert np.abs(update).max() > 1e-3
    assert np.abs(found[f"{name}.weight"] - (dense + update)).max() <= 2.0**-11 * np.abs(dense + update).max()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_quantized_model_comes_out_dense(
    model_folder: MakeModel,
    make_adapter: Callable[[Path], Path],
    registry: Registry,
    tmp_path: Path,
    with_adapter: bool,
) -> None:
    base = model_folder(dtype="float16", bits=4, head=True)
    adapter = make_adapter(base) if with_adapter else None
    exported(base, tmp_path / "out", registry, adapter)
    found, parts_of = numbers(tmp_path / "out"), stored(base)
    assert found.keys() == {name for name in parts_of if name.endswith("weight")}
    name = "layers.0.attention.wk"
    parts = [parts_of[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
    want = np.array(mx.dequantize(*[parts[0], *(p.astype(mx.float32) for p in parts[1:])], 32, 4)).astype(
        float
    )
    if adapter:
        loaded: Any = mx.load(str(adapter))
        held = {key: np.array(value) for key, value in loaded.items()}
        want += 2.0 * (held[f"{name}.lora_a"].astype(float) @ held[f"{name}.lora_b"].astype(float)).T
    assert found[f"{name}.weight"].dtype == np.float16
    assert np.abs(found[f"{name}.weight"] - want).max() <= 2.0**-11 * np.abs(want).max()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dim"] == 32 and not config.keys() & {"quantization", "quantizer", "quantized"}
    assert apart(logits(tmp_path / "out", registry), logits(base, registry, adapter)) < 2e-3


def test_what_is_exported_opens_as_a_model_folder_with_the_same_logits(
    model_folder: MakeModel, make_adapter: Callable[[Path], Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder()
    adapter = make_adapter(base)
    exported(base, tmp_path / "plain", registry)
    assert mx.array_equal(logits(tmp_path / "plain", registry), logits(base, registry))
    exported(base, tmp_path / "tuned", registry, adapter)
    tuned = logits(tmp_path / "tuned", registry)
    assert apart(tuned, logits(base, registry, adapter)) < 1e-5 < 1e-2 < apart(tuned, logits(base, registry))
    # The adapter alone is what any verb puts on the base.
    kept = tmp_path / "tuned" / "adapters.npz"
    assert mx.array_equal(logits(base, registry, kept), logits(base, registry, adapter))
    with np.load(kept, allow_pickle=False) as archive:
        assert "layers.1.attention.wq.lora_a" in archive.files
    with pytest.raises(ModelError, match="made for another base"):
        logits(tmp_path / "tuned", registry, kept)


def test_shards_are_exported_as_one_model(
    model_folder: MakeModel, make_adapter: Callable[[Path], Path], registry: Registry, tmp_path: Path
) -> None:
    adapter = make_adapter(model_folder())
    folder = Path(shutil.copytree(model_folder(), tmp_path / "sharded"))
    tensors = stored(folder)
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for shard in set(where.values()):
        mx.save_safetensors(str(folder / shard), {n: t for n, t in tensors.items() if where[n] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    exported(folder, tmp_path / "out", registry, adapter)
    exported(model_folder(), tmp_path / "want", registry, adapter)
    found, want = numbers(tmp_path / "out"), numbers(tmp_path / "want")
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[name], want[name]) for name in want)


def test_bfloat16_is_refused_with_what_to_do_and_cast_when_asked(
    model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    base = model_folder(dtype="bfloat16")
    with pytest.raises(ModelError, match=r"bfloat16, which \.npz cannot hold.*export\.dtype=float16"):
        exported(base, tmp_path / "out", registry)
    assert not (tmp_path / "out").exists()
    exported(base, tmp_path / "out", registry, dtype="float32")
    want = stored(base)
    assert all(
        np.array_equal(a, np.array(want[n].astype(mx.float32))) for n, a in numbers(tmp_path / "out").items()
    )


def test_python_exports_the_same_bytes(model_folder: MakeModel, registry: Registry, tmp_path: Path) -> None:
    report = mlxlora_core.export(model_folder(), "npz", tmp_path / "out", dtype="float16")
    exported(model_folder(), tmp_path / "want", registry, dtype="float16")
    assert set(report.files) == {"weights.npz", "config.json", "tokenizer.model"}
    for name in (*report.files, "export.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()
    with pytest.raises(UsageError, match="has no option 'type'"):
        mlxlora_core.export(model_folder(), "npz", tmp_path / "other", type="float16")


# --- memory -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_format", "bits"), [("safetensors", None), ("npz", None), ("safetensors", 4)], ids=str
)
def test_memory_does_not_grow_with_the_model(
    make_checkpoint: Callable[..., Path],
    make_adapter: Callable[[Path], Path],
    registry: Registry,
    tmp_path: Path,
    file_format: str,
    bits: int | None,
) -> None:
    """What MLX holds when a tensor is asked for, over 8 layers of 256."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dim=256, n_layers=8)
    base = tmp_path / "model"
    command = ["convert", "--torch-path", checkpoint, "--mlx-path", base, "--dtype", "float32"]
    command += ["--format", file_format, *(["-q", "--q-bits", bits] if bits else [])]
    assert cli.execute(list(map(str, command))) == 0
    adapter = make_adapter(base)
    alive: list[int] = []
    npz = registry.find("exporter", "npz")
    events = export(
        base,
        tmp_path / "out",
        Choice(npz, npz.spec.options()),
        registry,
        fused=AdapterFile(adapter),
        told=lambda what, done, count: alive.append(mx.get_active_memory()),
    )
    result_of(events)
    largest = 512 * 256 * 4
    size = (tmp_path / "out" / "weights.npz").stat().st_size
    assert len(alive) >= 8 * 9 and size > 20 * largest
    assert max(alive) - alive[0] <= 2 * largest


# --- what an exporter may leave -----------------------------------------------


def leaves(name: str, make: Callable[[Path], Any]) -> Callable[[ExportSource, Path, Any], None]:
    def export(source: ExportSource, target: Path, options: Any) -> None:
        (target / "model").write_bytes(b"x")
        make(target / name)

    return export


ODD: Mapping[str, tuple[Callable[[ExportSource, Path, Any], Any], str]] = {
    "nothing": (lambda source, target, options: None, "gives no file, wanted at least one file"),
    "an empty file": (lambda s, target, o: (target / "m").touch(), "gives empty files, wanted at least"),
    "a folder": (lambda s, target, o: (target / "m").mkdir(), "gives no file"),
    "a path": (lambda s, target, o: target, "gives PosixPath, wanted None"),
    "a link": (leaves("link", lambda path: path.symlink_to("/etc/hosts")), "gives link (a link)"),
    "a link inside": (leaves("link", lambda path: path.symlink_to("model")), "gives link (a link)"),
    "a linked folder": (leaves("link", lambda path: path.symlink_to("/etc")), "gives link (a link)"),
    "a pipe": (leaves("pipe", os.mkfifo), "gives pipe (no regular file)"),
    "unfinished": (leaves(".model.1.tmp", Path.touch), "gives .model.1.tmp (an unfinished file)"),
    "ours": (leaves("export.json", Path.touch), "gives export.json (a name that mlxlora uses itself)"),
    "gone": (lambda s, target, o: shutil.rmtree(target), "gives no file"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_an_exporter_must_not_leave_is_8_and_leaves_nothing(
    model_folder: MakeModel, registry: Registry, tmp_path: Path, case: str
) -> None:
    function, words = ODD[case]
    with pytest.raises(PluginError) as caught:
        result_of(export(model_folder(), tmp_path / "out", by(function), registry))
    assert f"exporter odd:odd: export {words}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_files_in_folders_are_fine(model_folder: MakeModel, registry: Registry, tmp_path: Path) -> None:
    def nested(source: ExportSource, target: Path, options: Any) -> None:
        (target / "deep" / "er").mkdir(parents=True)
        (target / "deep" / "er" / "model").write_bytes(b"12345")

    report = result_of(export(model_folder(), tmp_path / "out", by(nested), registry))
    assert report.files == {"deep/er/model": 5}
    assert holds_only_an_export(tmp_path / "out")


def test_an_exporter_that_fails_leaves_nothing(
    model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    def fails(source: ExportSource, target: Path, options: Any) -> None:
        (target / "half").write_bytes(b"x")
        raise ResourceError("no room")

    with pytest.raises(ResourceError, match="no room"):
        result_of(export(model_folder(), tmp_path / "out", by(fails), registry))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_fuses_to_another_shape_is_8(
    model_folder: MakeModel, make_adapter: Callable[[Path], Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder()
    adapter = make_adapter(base)
    lora = registry.find("adapter", "lora")
    spec = type(lora.spec)(**{**vars(lora.spec), "fuse": lambda module, weight: weight[:1]})
    others = [c for c in registry.components if c.kind != "adapter"]
    changed = Registry(registry.plugins, [*others, Component("adapter", spec, lora.plugin)])
    with pytest.raises(PluginError, match=r"lora:lora: fuse gives \(1, \d+\) float32, wanted \(\d\d"):
        exported(base, tmp_path / "out", changed, adapter)
    assert not (tmp_path / "out").exists()


# --- where it goes ------------------------------------------------------------


def test_the_record_says_what_was_exported_and_by_whom(
    model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    base = model_folder()
    exported(base, tmp_path / "out", registry, dtype="float16")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    files = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != "export.json"}
    assert record == {
        "exporter": "npz:npz",
        "options": {"dtype": "float16"},
        "model": loading.load(base, registry).fingerprint,
        "adapter": None,
        "versions": {"mlxlora": __version__},
        "files": files,
    }


@pytest.mark.parametrize("change", [None, "file more", "no record", "no folder"])
def test_only_an_export_is_replaced_and_only_when_asked(
    model_folder: MakeModel, registry: Registry, tmp_path: Path, change: str | None
) -> None:
    base, target, npz = model_folder(), tmp_path / "out", registry.find("exporter", "npz")
    exported(base, target, registry)

    def again(overwrite: bool) -> ExportReport:
        return result_of(export(base, target, Choice(npz, npz.spec.options()), registry, overwrite=overwrite))

    if change == "file more":
        (target / "notes.txt").touch()
    elif change == "no record":
        (target / "export.json").unlink()
    elif change == "no folder":
        shutil.rmtree(target)
        target.touch()
    with pytest.raises(SafetyError):
        again(overwrite=False)
    if change is None:
        assert set(again(overwrite=True).files) == {"weights.npz", "config.json", "tokenizer.model"}
    else:
        with pytest.raises(SafetyError):
            again(overwrite=True)


def test_a_model_cannot_be_its_own_export(
    model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    exported(model_folder(), tmp_path / "out", registry)
    with pytest.raises(UsageError, match="is an input of this command"):
        exported(tmp_path / "out", tmp_path / "out", registry)


def test_faults_of_the_base_and_of_the_adapter_are_told_before_anything_is_written(
    model_folder: MakeModel, make_adapter: Callable[[Path], Path], registry: Registry, tmp_path: Path
) -> None:
    other = make_adapter(model_folder(seed=1))
    broken = Path(shutil.copytree(model_folder(), tmp_path / "broken"))
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    for base, adapter, words in (
        (model_folder(), other, "made for another base"),
        (broken, None, "model.safetensors"),
        (tmp_path / "absent", None, "not a model folder"),
    ):
        with pytest.raises(MlxloraError, match=words):
            exported(base, tmp_path / "out", registry, adapter)
    assert not (tmp_path / "out").exists()
