from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlxlora_demo
import numpy as np
import pytest

from mlxlora_core.errors import UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.model.fuse import fuse
from mlxlora_core.model.several import AdapterShare, shares_of
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import Quantization, configure

MakeModel = Callable[..., Path]


@pytest.fixture
def make_adapter(registry: Registry, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an adapter with random values for a base."""

    def make(base: Path, name: str, **options: Any) -> Path:
        model = loading.load(base, registry)
        adapted = adapters.attach(model, *configure(registry.find("adapter", "lora"), options), 0)
        key = mx.random.key(len(name))
        own = adapters.trainable(model.module).items()
        model.module.load_weights(
            [(n, 0.2 * mx.random.normal(t.shape, key=key)) for n, t in own], strict=False
        )
        path = tmp_path / f"{name}.safetensors"
        adapters.save(path, model, adapted)
        return path

    return make


def test_the_changes_of_several_are_added_by_their_weights(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder()
    files = [
        make_adapter(base, "a", rank=3, targets=("wq", "w2")),
        make_adapter(base, "bb", rank=5, scale=0.5),
    ]
    shares = shares_of([AdapterFile(path) for path in files], (0.25, -1.5))
    report = result_of(fuse(base, shares, tmp_path / "fused", registry))
    assert report.distance < 1e-5 < report.base_distance
    want = {
        name: np.array(tensor) for name, tensor in tensor_file.load(base / "model.safetensors")[0].items()
    }
    for path, factor in zip(files, (0.25 * 2.0, -1.5 * 0.5), strict=True):
        found = {name: np.array(tensor) for name, tensor in tensor_file.load(path)[0].items()}
        for place in {name.rpartition(".")[0] for name in found}:
            want[f"{place}.weight"] = (
                want[f"{place}.weight"] + factor * (found[f"{place}.lora_a"] @ found[f"{place}.lora_b"]).T
            )
    got = tensor_file.load(tmp_path / "fused" / "model.safetensors")[0]
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        np.testing.assert_allclose(np.array(tensor), want[name], atol=1e-6, err_msg=name)
    assert report.linears == 2 * 3  # wq, wv and w2 of two layers


def test_as_many_weights_as_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 weights are given for 1 adapter files"):
        shares_of([AdapterFile(tmp_path / "a")], (1, 2, 3))


@pytest.mark.parametrize("group_size", [128, 32])
def test_the_group_size_that_keeps_most_of_the_change_is_found(
    make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path, group_size: int
) -> None:
    affine = registry.find("quantizer", "affine")
    base, bits = tmp_path / "base", Quantization(*configure(affine, {"group_size": group_size}))
    result_of(convert(Path(mlxlora_demo.__file__).parent / "base", base, registry, quantization=bits))
    shares = [AdapterShare(AdapterFile(make_adapter(base, "a", layers=2, targets=("wq",))))]
    plain = result_of(fuse(base, shares, tmp_path / "plain", registry))
    report = result_of(fuse(base, shares, tmp_path / "found", registry, search_group_size=True))
    by_size = {one.group_size: one for one in report.tried}
    assert by_size.keys() == {32, 64, 128} and by_size[32].bytes > by_size[64].bytes > by_size[128].bytes
    # What is told of the base's own size is what fusing without a search comes to.
    assert by_size[group_size].distance == pytest.approx(plain.distance, rel=1e-3)
    taken = min(report.tried, key=lambda one: one.distance)
    assert report.distance == pytest.approx(taken.distance, rel=1e-3) and taken.group_size == 32
    config = json.loads((tmp_path / "found" / "config.json").read_text())
    differing = {path: options for path, options in config["quantized"].items() if options}
    changed = {f"layers.{layer}.attention.wq" for layer in (4, 5)}
    assert differing == ({} if group_size == 32 else {path: {"group_size": 32} for path in changed})
    assert config["quantization"]["group_size"] == group_size


def test_there_must_be_a_group_size_to_search(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder()
    shares = [AdapterShare(AdapterFile(make_adapter(base, "a")))]
    with pytest.raises(UsageError, match="no group size to search: the base is not quantized"):
        result_of(fuse(base, shares, tmp_path / "out", registry, search_group_size=True))
    assert not (tmp_path / "out").exists()
