"""What an exporter is handed: in its layout, packed or dense, and where the one file goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core import cli
from mlxlora_core.errors import ModelError, PluginError, SafetyError, UsageError
from mlxlora_core.files import lazy_tensors, save_tensors
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.events import result_of
from mlxlora_core.model.export import ExportReport, export
from mlxlora_core.model.fuse import fuse
from mlxlora_core.model.several import AdapterShare
from mlxlora_core.model.weights import read_weights
from mlxlora_core.plugins import Choice, Component, Plugin, Registry
from mlxlora_core.specs import Exporter, NoOptions
from mlxlora_core.values import ExportSource

MakeModel = Callable[..., Path]


class Kept:
    """An exporter that keeps what it is handed and writes one file."""

    def __init__(self, name: str = "model", **said: Any) -> None:
        self.source: ExportSource = ExportSource({}, {}, {})
        self.read: dict[str, mx.array] = {}
        self.parts: dict[str, mx.array] = {}
        self.name = name
        spec = Exporter(name="kept", summary="s", export=self.export, **said)
        plugin = Plugin("kept", "kept", "1", "installed", "kept")
        self.choice = Choice(Component("exporter", spec, plugin), NoOptions())

    def export(self, source: ExportSource, target: Path, options: Any) -> None:
        self.source = source
        for name, tensor in source.tensors.items():
            self.read[name] = tensor.read()
            for part, held in tensor.packed.parts.items() if tensor.packed else ():
                self.parts[f"{name.removesuffix('.weight')}.{part}"] = held.read()
        (target / self.name).write_bytes(b"kept")

    def of(self, base: Path, target: Path, registry: Registry, adapter: Path | None = None) -> ExportReport:
        fused = AdapterFile(adapter) if adapter else None
        return result_of(export(base, target, self.choice, registry, fused=fused))


@pytest.fixture
def make_adapter(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A function that trains all linears of a base for two large steps."""

    def make(base: Path) -> Path:
        path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
        command = ["train", "--model", base, "--data", tiny_data, "--adapter-file", path]
        command += ["--set", "adapter.targets=all-linear", "--iters", 2, "--learning-rate", 0.05]
        assert cli.execute(list(map(str, command))) == 0
        return path

    return make


def stored(folder: Path) -> dict[str, mx.array]:
    return {name: tensor.read() for name, tensor in read_weights(folder)[0].items()}


def halves(weight: mx.array, heads: int) -> np.ndarray:
    """Rows of neighbouring pairs, put as Hugging Face has them, by numpy alone."""
    array = np.array(weight.astype(mx.float32))
    width = array.shape[0] // heads
    return array.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)


def test_names_rows_and_config_are_those_of_the_layout(
    model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    base, kept = model_folder(dtype="float16"), Kept(layout="hf")
    kept.of(base, tmp_path / "out", registry)
    want = stored(base)
    config = kept.source.config
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is False
    query = kept.read["model.layers.1.self_attn.q_proj.weight"]
    assert query.dtype == mx.float16
    heads = config["num_attention_heads"]
    assert np.array_equal(
        np.array(query.astype(mx.float32)), halves(want["layers.1.attention.wq.weight"], heads)
    )
    assert mx.array_equal(kept.read["lm_head.weight"], want["output.weight"])
    assert len(kept.read) == len(want)
    assert kept.source.stops and kept.source.vocab_size == config["vocab_size"]
    assert kept.source.base == str(base)


def test_an_architecture_that_does_not_write_the_layout_is_told(
    model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="'llama' does not write the layout 'onnx'"):
        Kept(layout="onnx").of(model_folder(), tmp_path / "out", registry)


def test_packed_weights_are_handed_over_as_they_are(
    model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    base = model_folder(dtype="float16", bits=4, head=True)
    kept = Kept(layout="hf", packed=lambda options: True)
    kept.of(base, tmp_path / "out", registry)
    want = stored(base)
    value = "model.layers.0.self_attn.v_proj"
    packed = kept.source.tensors[f"{value}.weight"].packed
    assert packed is not None and (packed.quantizer, packed.options["bits"]) == ("affine", 4)
    for part in ("weight", "scales", "biases"):
        assert mx.array_equal(kept.parts[f"{value}.{part}"], want[f"layers.0.attention.wv.{part}"])
    heads = kept.source.config["num_attention_heads"]
    scales = kept.parts["model.layers.0.self_attn.q_proj.scales"]
    assert np.array_equal(
        np.array(scales.astype(mx.float32)), halves(want["layers.0.attention.wq.scales"], heads)
    )
    parts = [kept.parts[f"{value}.{part}"] for part in ("weight", "scales", "biases")]
    dense = mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), 32, 4)
    assert kept.read[f"{value}.weight"].dtype == mx.float32
    assert mx.abs(kept.read[f"{value}.weight"] - dense).max() < 1e-6


def test_an_adapter_in_a_packed_weight_is_quantized_again_as_fuse_does(
    model_folder: MakeModel, make_adapter: Callable[[Path], Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder(dtype="float16", bits=4, head=True)
    adapter = make_adapter(base)
    result_of(fuse(base, [AdapterShare(AdapterFile(adapter))], tmp_path / "fused", registry))
    kept = Kept(packed=lambda options: True)
    kept.of(base, tmp_path / "out", registry, adapter)
    want = stored(tmp_path / "fused")
    assert kept.parts.keys() | kept.read.keys() == want.keys()
    changed = 0
    for name, tensor in kept.parts.items():
        assert mx.array_equal(tensor, want[name]), name
        changed += not mx.array_equal(tensor, stored(base)[name])
    assert changed > 20


def test_an_adapter_alone_is_told_with_its_places(
    model_folder: MakeModel, make_adapter: Callable[[Path], Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder()
    adapter = make_adapter(base)
    kept = Kept(layout="hf", takes="adapter")
    report = kept.of(base, tmp_path / "out", registry, adapter)
    assert (report.tensors, report.adapter) == (0, "lora:lora") and not kept.source.tensors
    told = kept.source.adapter
    assert told is not None and told.layers == len({p.split(".")[1] for p in told.paths if "layers" in p})
    path = "layers.1.attention.wq"
    assert told.places[path].foreign == "model.layers.1.self_attn.q_proj.weight"
    assert told.places[path].rows is not None
    update = told.low_rank[path]
    assert mx.array_equal(update.a, lazy_tensors(adapter)[f"{path}.lora_a"].read()) and update.scale == 2.0
    with pytest.raises(UsageError, match="--adapter-file"):
        kept.of(base, tmp_path / "other", registry)


# --- one file -----------------------------------------------------------------


def test_a_target_with_the_ending_is_the_one_file(
    model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    kept = Kept("model.kept", ending=".kept")
    report = kept.of(model_folder(), tmp_path / "mine.kept", registry)
    assert (tmp_path / "mine.kept").read_bytes() == b"kept" and report.path == str(tmp_path / "mine.kept")
    assert report.files == {"model.kept": 4}
    kept.of(model_folder(), tmp_path / "folder", registry)
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"model.kept", "export.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"mine.kept", "folder"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_replaced_when_asked_and_when_the_exporter_knows_it(
    model_folder: MakeModel, registry: Registry, tmp_path: Path, overwrite: bool
) -> None:
    target = tmp_path / "mine.kept"
    kept = Kept("model.kept", ending=".kept", wrote=lambda path: path.read_bytes() == b"before")

    def again() -> ExportReport:
        return result_of(export(model_folder(), target, kept.choice, registry, overwrite=overwrite))

    target.write_bytes(b"precious")
    with pytest.raises(SafetyError, match="was not written by mlxlora"):
        again()
    assert target.read_bytes() == b"precious"
    target.write_bytes(b"before")
    target.chmod(0o640)
    if overwrite:
        again()
        assert target.read_bytes() == b"kept" and target.stat().st_mode & 0o777 == 0o640
    else:
        with pytest.raises(SafetyError, match="add --overwrite"):
            again()
        assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.kept"]


@pytest.mark.parametrize("name", ["model.bin", "model.kept"])
def test_an_exporter_of_one_file_leaves_one_with_its_ending(
    model_folder: MakeModel, registry: Registry, tmp_path: Path, name: str
) -> None:
    kept = Kept(name, ending=".kept")
    inner = kept.choice.component.spec.export

    def export_two(source: ExportSource, target: Path, options: Any) -> None:
        inner(source, target, options)
        if name == "model.kept":
            (target / "more.kept").write_bytes(b"x")

    spec = Exporter(name="kept", summary="s", export=export_two, ending=".kept")
    choice = Choice(Component("exporter", spec, kept.choice.component.plugin), NoOptions())
    with pytest.raises(PluginError, match=r"wanted one file, which ends with \.kept"):
        result_of(export(model_folder(), tmp_path / "mine.kept", choice, registry))
    assert list(tmp_path.iterdir()) == []


def test_stacked_rows_stay_packed_where_all_are_packed_alike(tmp_path: Path) -> None:
    from dataclasses import replace

    from mlxlora_core.files.lazy_rows import restored_rows, stacked_rows
    from mlxlora_core.values import LazyTensor, PackedTensor

    save_tensors(
        tmp_path / "t.safetensors",
        {
            "one": LazyTensor((2, 3), "float16", lambda: mx.arange(6).reshape(2, 3).astype(mx.float16)),
            "two": LazyTensor((1, 3), "float32", lambda: mx.ones((1, 3))),
        },
    )
    one, two = (lazy_tensors(tmp_path / "t.safetensors")[name] for name in ("one", "two"))
    both = stacked_rows([one, two])
    assert (both.shape, both.dtype, both.packed) == ((3, 3), "float32", None)
    assert both.read().tolist() == [[0, 1, 2], [3, 4, 5], [1, 1, 1]]
    packed = [replace(t, packed=PackedTensor("affine", {"bits": 4}, {"weight": one})) for t in (one, one)]
    stacked = stacked_rows(packed).packed
    assert stacked is not None and stacked.parts["weight"].read().shape == (4, 3)
    other = replace(one, packed=PackedTensor("affine", {"bits": 8}, {"weight": one}))
    assert stacked_rows([packed[0], other]).packed is None
    assert restored_rows(one, [1, 0]).read().tolist() == [[3, 4, 5], [0, 1, 2]]
