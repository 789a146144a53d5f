from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.errors import ModelError, PluginError, SafetyError, UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.model import adapters
from mlxlora_core.model import folder as folders
from mlxlora_core.model.events import result_of
from mlxlora_core.model.fuse import fuse
from mlxlora_core.model.weights import WEIGHTS
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import configure

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 5, 7, 9, 300, 17, 44, 45]])


@pytest.fixture
def make_adapter(registry: Registry, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an adapter with random values for a base."""

    def make(base: Path, size: float = 0.1, **options: Any) -> Path:
        model = folders.load(base, registry)
        lora = registry.find("adapter", "lora")
        adapted = adapters.attach(model, *configure(lora, {"rank": 4, **options}), 0)
        names = adapters.trainable(model.module).items()
        values = [(name, mx.random.normal(t.shape, key=mx.random.key(7)) * size) for name, t in names]
        model.module.load_weights(values, strict=False)
        path = tmp_path / "adapter.safetensors"
        adapters.save(path, model, adapted)
        return path

    return make


def logits(folder: Path, registry: Registry, adapter: Path | None = None) -> mx.array:
    model = folders.load(folder, registry)
    if adapter is not None:
        adapters.load(adapter, model, registry)
    return model.language_model(TOKENS)


def weights(folder: Path) -> dict[str, mx.array]:
    (name,) = {path.name for path in folder.iterdir()} & set(WEIGHTS.values())
    return tensor_file.load(folder / name)[0]


def same_bits(one: mx.array, other: mx.array) -> bool:
    return one.dtype == other.dtype and bytes(tensor_file._bytes(one)) == bytes(tensor_file._bytes(other))


@pytest.mark.parametrize("file_format", ["safetensors", "npz"])
def test_a_dense_fused_model_is_the_adapted_one(
    model_folder: MakeModel,
    make_adapter: Callable[..., Path],
    registry: Registry,
    tmp_path: Path,
    file_format: str,
) -> None:
    base = model_folder(file_format=file_format)
    adapter = make_adapter(base, targets=("wq", "wo", "w2"))
    report = result_of(fuse(base, adapter, tmp_path / "fused", registry))
    want, got = logits(base, registry, adapter), logits(tmp_path / "fused", registry)
    assert mx.allclose(got, want, atol=1e-4)
    assert not mx.allclose(logits(base, registry), want, atol=1e-2)
    assert (report.linears, report.same_argmax) == (6, 1.0)
    assert report.distance < 1e-5 < 1e-2 < report.base_distance
    assert report.largest_difference < 1e-4
    # The weight itself, by numpy: W + scale (A B)^T.
    tensors = {name: np.array(tensor) for name, tensor in tensor_file.load(adapter)[0].items()}
    place = "layers.1.feed_forward.w2"
    update = 2.0 * (tensors[f"{place}.lora_a"] @ tensors[f"{place}.lora_b"]).T
    fused = np.array(weights(tmp_path / "fused")[f"{place}.weight"])
    np.testing.assert_allclose(fused, np.array(weights(base)[f"{place}.weight"]) + update, atol=1e-6)


@pytest.mark.parametrize(("bits", "dtype"), [(None, "float16"), (None, "bfloat16"), (4, "float16")])
def test_what_the_adapter_does_not_touch_is_the_same_byte_for_byte(
    model_folder: MakeModel,
    make_adapter: Callable[..., Path],
    registry: Registry,
    tmp_path: Path,
    bits: int | None,
    dtype: str,
) -> None:
    base = model_folder(bits=bits, dtype=dtype)
    result_of(fuse(base, make_adapter(base, layers=1), tmp_path / "fused", registry))
    before, after = weights(base), weights(tmp_path / "fused")
    assert before.keys() == after.keys()
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in changed} == {
        "layers.1.attention.wq",
        "layers.1.attention.wv",
    }
    assert all(before[name].dtype == after[name].dtype for name in before)
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "fused" / name).read_bytes() == (base / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "fused"]


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.25)])
def test_a_quantized_fused_model_is_as_far_as_the_report_says(
    model_folder: MakeModel,
    make_adapter: Callable[..., Path],
    registry: Registry,
    tmp_path: Path,
    bits: int,
    bound: float,
) -> None:
    base = model_folder(bits=bits, dtype="float16")
    adapter = make_adapter(base)
    report = result_of(fuse(base, adapter, tmp_path / "fused", registry))
    fused = folders.load(tmp_path / "fused", registry)
    assert type(fused.language_model.layers[0].attention.wq).__name__ == "QuantizedLinear"
    want = logits(base, registry, adapter)
    got = fused.language_model(TOKENS)
    distance = float(mx.linalg.norm((got - want).reshape(-1)) / mx.linalg.norm(want.reshape(-1)))
    assert 0 < report.distance < bound
    assert report.distance / 4 < distance < report.distance * 4  # other tokens than the report's
    assert report.distance < report.base_distance


def test_the_report_is_measured_on_the_model_that_was_written(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder()
    adapter = make_adapter(base)
    report = result_of(fuse(base, adapter, tmp_path / "fused", registry))
    probe = mx.random.randint(0, 320, (1, 64), key=mx.random.key(0))
    adapted = folders.load(base, registry)
    adapters.load(adapter, adapted, registry)
    want, plain, got = (
        np.array(model.language_model(probe))
        for model in (adapted, folders.load(base, registry), folders.load(tmp_path / "fused", registry))
    )
    assert report.largest_difference == pytest.approx(np.abs(got - want).max(), rel=1e-4)
    assert report.distance == pytest.approx(np.linalg.norm(got - want) / np.linalg.norm(want), rel=1e-4)
    assert report.base_distance == pytest.approx(
        np.linalg.norm(plain - want) / np.linalg.norm(want), rel=1e-4
    )


def test_an_adapter_that_does_nothing_fuses_to_the_base(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder(dtype="float16")
    report = result_of(fuse(base, make_adapter(base, size=0.0), tmp_path / "fused", registry))
    before, after = weights(base), weights(tmp_path / "fused")
    assert all(same_bits(before[name], after[name]) for name in before)
    assert report.distance == report.base_distance == 0.0


# --- refusals -----------------------------------------------------------------


def test_the_base_is_never_its_own_target(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model_folder(), tmp_path / "base"))
    adapter = make_adapter(base)
    content = (base / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(base)
    for target in (base, tmp_path / "link", base / ".." / "base"):
        with pytest.raises(UsageError, match="is an input of this command"):
            result_of(fuse(base, adapter, target, registry, overwrite=True))
    assert (base / "model.safetensors").read_bytes() == content


def test_other_targets_follow_the_rules_of_a_folder(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder()
    adapter = make_adapter(base)
    target = tmp_path / "fused"
    target.mkdir()
    result_of(fuse(base, adapter, target, registry))
    with pytest.raises(SafetyError, match="there already"):
        result_of(fuse(base, adapter, target, registry))
    result_of(fuse(base, adapter, target, registry, overwrite=True))
    (target / "notes").write_text("")
    with pytest.raises(SafetyError, match="something else"):
        result_of(fuse(base, adapter, target, registry, overwrite=True))


def test_an_adapter_of_another_base_makes_no_model(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    adapter = make_adapter(model_folder())
    with pytest.raises(ModelError, match="made for another base"):
        result_of(fuse(model_folder(seed=1), adapter, tmp_path / "fused", registry))
    with pytest.raises(ModelError, match="rank is 4, wanted 8"):
        result_of(fuse(model_folder(), adapter, tmp_path / "fused", registry, values={"rank": 8}))
    assert not (tmp_path / "fused").exists()


def test_weights_that_the_type_of_the_base_cannot_hold_make_no_model(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder(dtype="float16")
    with pytest.raises(ModelError, match=r"wq\.weight, with the adapter in it, has values .* as float16"):
        result_of(fuse(base, make_adapter(base, size=500.0), tmp_path / "fused", registry))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors"]


def test_shards_become_one_file(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    import json

    base = Path(shutil.copytree(model_folder(), tmp_path / "base"))
    adapter = make_adapter(base)
    tensors = sorted(weights(base).items())
    mx.eval([tensor for _, tensor in tensors])
    (base / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {}
    for name, part in zip(names, (tensors[:9], tensors[9:]), strict=True):
        tensor_file.save(base / name, part, {}, most=len(part))
        index |= {key: name for key, _ in part}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    result_of(fuse(base, adapter, tmp_path / "fused", registry))
    result_of(fuse(model_folder(), adapter, tmp_path / "other", registry))
    assert (tmp_path / "fused" / "model.safetensors").read_bytes() == (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda module, weight: weight.T[:3], r"fuse gives \(3, 32\) float32, wanted \(32, 32\) float32"),
        (lambda module, weight: weight.astype(mx.float16), r"fuse gives \(32, 32\) float16, wanted"),
        (lambda module, weight: weight * mx.nan, "fuse gives values that are not finite, wanted finite ones"),
        (lambda module, weight: None, "fuse gives NoneType, wanted array"),
    ],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_a_weight_that_an_adapter_should_not_give_names_it_and_makes_no_model(
    model_folder: MakeModel,
    make_adapter: Callable[..., Path],
    registry: Registry,
    tmp_path: Path,
    bits: int | None,
    broken: Any,
    says: str,
) -> None:
    base = model_folder(bits=bits)
    adapter = make_adapter(base)
    components = [
        dataclasses.replace(c, spec=dataclasses.replace(c.spec, fuse=broken)) if c.kind == "adapter" else c
        for c in registry.components
    ]
    with pytest.raises(PluginError, match=rf"adapter lora:lora: {says}"):
        result_of(fuse(base, adapter, tmp_path / "fused", Registry(registry.plugins, components)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors"]


def test_a_quantizer_that_does_not_take_the_weight_again_names_itself(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder(bits=4)
    adapter = make_adapter(base)
    components = [
        dataclasses.replace(c, spec=dataclasses.replace(c.spec, quantize=lambda weight, options: None))
        if c.kind == "quantizer"
        else c
        for c in registry.components
    ]
    with pytest.raises(PluginError, match=r"affine:affine: quantize gives None for layers\.0\.attention\.wq"):
        result_of(fuse(base, adapter, tmp_path / "fused", Registry(registry.plugins, components)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors"]
