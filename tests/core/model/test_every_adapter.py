"""Every adapter on a model: fused and exported it does what it does, over dense and quantized bases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.files import tensor_file
from mlxlora_core.model import adapters, loading
from mlxlora_core.model import fuse as fusing
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.events import result_of
from mlxlora_core.model.own_weights import own_tensors
from mlxlora_core.model.several import AdapterShare
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import configure

TOKENS = mx.array([[1, 5, 7, 9, 300, 17, 44, 45]])
#: adapter -> options with which it goes on something
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ("wq", "w2", "tok_embeddings", "lm_head"), "rank": 4},
    "rslora": {"overrides": "wq: rank=3, wv: alpha=2"},
    "lora-plus": {"targets": ("embed_tokens",)},
    "dora": {"targets": ("all-linear",), "rank": 4},
    "pissa": {"targets": ("q_proj", "lm_head"), "rank": 4},
    "ia3": {},
    "vera": {"targets": ("all-linear",), "rank": 12},
}


@pytest.fixture
def base(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[[int | None], Path]:
    """A model whose queries, keys and values have biases, as those of Qwen 2 do."""

    def make(bits: int | None) -> Path:
        folder = Path(shutil.copytree(model_folder(bits=bits, head=True), tmp_path / "base"))
        tensors, _ = tensor_file.load(folder / "model.safetensors")
        mx.eval(tensors)
        for layer in range(2):
            for name, size in (("wq", 32), ("wk", 16), ("wv", 16)):
                tensors[f"layers.{layer}.attention.{name}.bias"] = mx.random.normal(
                    (size,), key=mx.random.key(layer)
                )
        (folder / "model.safetensors").unlink()
        tensor_file.save(folder / "model.safetensors", tensors.items(), {}, len(tensors))
        config = json.loads((folder / "config.json").read_text()) | {"biases": ["wq", "wk", "wv"]}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def write_adapter(folder: Path, name: str, registry: Registry, path: Path) -> None:
    """An adapter of a kind, all that trains moved from its start."""
    model = loading.load(folder, registry)
    before = model.language_model(TOKENS)
    adapted = adapters.attach(model, *configure(registry.find("adapter", name), KINDS[name]), 0)
    np.testing.assert_allclose(model.language_model(TOKENS), before, atol=1e-5)
    moved = [
        (key, tensor + 0.1 * mx.random.normal(tensor.shape, key=mx.random.key(number)))
        for number, (key, tensor) in enumerate(adapters.trainable(model.module).items())
    ]
    model.module.load_weights(moved, strict=False)
    adapters.save(path, model, adapted)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_fused_and_exported_as_what_it_does(
    base: Callable[[int | None], Path], registry: Registry, tmp_path: Path, name: str, bits: int | None
) -> None:
    folder, path = base(bits), tmp_path / "adapter.safetensors"
    write_adapter(folder, name, registry, path)
    model = loading.load(folder, registry)
    before = model.language_model(TOKENS)
    adapters.load(path, model, registry)
    want = model.language_model(TOKENS)
    assert mx.abs(want - before).max() > 1e-2
    report = result_of(
        fusing.fuse(folder, [AdapterShare(AdapterFile(path))], tmp_path / "fused", registry, dequantize=True)
    )
    assert report.distance < 1e-5 < 1e-3 < report.base_distance
    fused = loading.load(tmp_path / "fused", registry)
    np.testing.assert_allclose(fused.language_model(TOKENS), want, atol=1e-4)
    outline, stored = loading.outline(folder, registry)
    exported = own_tensors(outline, stored, adapters.load(path, outline, registry))
    written = tensor_file.load(tmp_path / "fused" / "model.safetensors")[0]
    assert exported.keys() == written.keys()
    for key, tensor in exported.items():
        np.testing.assert_allclose(tensor.read(), written[key], atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", KINDS)
def test_it_comes_back_from_its_file_to_the_bit(
    base: Callable[[int | None], Path], registry: Registry, tmp_path: Path, name: str
) -> None:
    folder, path = base(None), tmp_path / "adapter.npz"
    write_adapter(folder, name, registry, path)
    first, second = (loading.load(folder, registry) for _ in range(2))
    one, other = adapters.load(path, first, registry), adapters.load(path, second, registry)
    held, again = (
        adapters.adapter_parameters(first.module, one.paths),
        adapters.adapter_parameters(second.module, other.paths),
    )
    assert held.keys() == again.keys()
    assert all(mx.array_equal(held[key], again[key]) for key in held)
    adapters.save(tmp_path / "again.npz", first, one)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
