from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.errors import ModelError, PluginError, SafetyError, UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.model import adapters, loading
from mlxlora_core.model import fuse as fusing
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.events import TensorWritten, result_of
from mlxlora_core.model.several import AdapterShare
from mlxlora_core.model.weights import WEIGHTS
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import configure

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 5, 7, 9, 300, 17, 44, 45]])


@pytest.fixture
def make_adapter(registry: Registry, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an adapter with random values for a base."""

    def make(base: Path, size: float = 0.1, **options: Any) -> Path:
        model = loading.load(base, registry)
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
    model = loading.load(folder, registry)
    if adapter is not None:
        adapters.load(adapter, model, registry)
    return model.language_model(TOKENS)


def fuse(base: Path, adapter: Path, target: Path, registry: Registry, **options: Any) -> Any:
    """The events of fusing a file of which nothing is insisted on."""
    insisted = {key: options.pop(key) for key in ("name", "values", "any_base") if key in options}
    return fusing.fuse(base, [AdapterShare(AdapterFile(adapter, **insisted))], target, registry, **options)


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
    fused = loading.load(tmp_path / "fused", registry)
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
    adapted = loading.load(base, registry)
    adapters.load(adapter, adapted, registry)
    want, plain, got = (
        np.array(model.language_model(probe))
        for model in (adapted, loading.load(base, registry), loading.load(tmp_path / "fused", registry))
    )
    assert report.largest_difference == pytest.approx(np.abs(got - want).max(), rel=1e-4)
    assert report.distance == pytest.approx(np.linalg.norm(got - want) / np.linalg.norm(want), rel=1e-4)
    assert report.base_distance == pytest.approx(
        np.linalg.norm(plain - want) / np.linalg.norm(want), rel=1e-4
    )


def test_dropout_is_off_when_the_report_is_measured(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder()
    adapter = make_adapter(base, dropout=0.5)
    report = result_of(fuse(base, adapter, tmp_path / "fused", registry))
    assert report.distance < 1e-5 and report.same_argmax == 1.0
    assert mx.allclose(logits(tmp_path / "fused", registry), logits(base, registry, adapter), atol=1e-4)


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


# --- dense again, and other bases ---------------------------------------------


def dequantized(weights: dict[str, mx.array], path: str, bits: int) -> np.ndarray:
    """The weight that is packed below ``path`` by groups of 32, by numpy."""
    words, scales, biases = (np.array(weights[f"{path}.{part}"]) for part in ("weight", "scales", "biases"))
    stream = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(-1, bits)
    steps = (stream * (1 << np.arange(bits))).sum(1).reshape(len(words), -1).astype(np.float64)
    return steps * scales.astype(np.float64).repeat(32, 1) + biases.astype(np.float64).repeat(32, 1)


@pytest.mark.parametrize(("bits", "file_format"), [(4, "safetensors"), (8, "npz"), (3, "safetensors")])
def test_a_quantized_base_is_fused_into_a_dense_model(
    model_folder: MakeModel,
    make_adapter: Callable[..., Path],
    registry: Registry,
    tmp_path: Path,
    bits: int,
    file_format: str,
) -> None:
    base = model_folder(bits=bits, dtype="float16", file_format=file_format)
    adapter = make_adapter(base, targets=("wq", "w2"), layers=1)
    events = list(fuse(base, adapter, tmp_path / "fused", registry, dequantize=True))
    report, before, after = events[-1], weights(base), weights(tmp_path / "fused")
    assert (report.linears, report.rounded) == (2, 0) and report.same_argmax > 0.95
    assert report.distance < 2e-3 < 1e-2 < report.base_distance
    config = json.loads((base / "config.json").read_text())
    for key in ("quantizer", "quantization", "quantized"):
        del config[key]
    assert json.loads((tmp_path / "fused" / "config.json").read_text()) == config
    assert {str(t.dtype) for t in after.values()} == {"mlx.core.float16"}
    held, _ = tensor_file.load(adapter)
    tensors = {name: np.array(tensor).astype(np.float64) for name, tensor in held.items()}
    for name, tensor in after.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in before:
            assert same_bits(tensor, before[name])
            continue
        want = dequantized(before, path, bits)
        if f"{path}.lora_a" in tensors:
            want += 2.0 * (tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"]).T
        np.testing.assert_allclose(np.array(tensor), want, atol=2e-3, err_msg=name)
    taken = sum(path.stat().st_size for path in (tmp_path / "fused").iterdir())
    said = re.search(r"needs ([0-9.]+) MB", events[0].text)
    assert said is not None, events[0].text
    need = float(said[1]) * 1e6
    assert taken < need < 1.2 * taken


def test_a_dense_base_stays_dense_whether_that_is_asked_for_or_not(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder(dtype="float16")
    adapter = make_adapter(base)
    plain = result_of(fuse(base, adapter, tmp_path / "plain", registry))
    asked = result_of(fuse(base, adapter, tmp_path / "asked", registry, dequantize=True))
    assert plain.rounded == asked.rounded == 0
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "asked")
    assert one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def test_only_linears_that_are_quantized_again_count_as_rounded(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = model_folder(bits=4, dtype="float16")
    assert result_of(fuse(base, make_adapter(base), tmp_path / "fused", registry)).rounded == 4


def test_an_adapter_of_a_quantized_base_goes_into_the_dense_one_when_allowed(
    model_folder: MakeModel, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    quantized, dense = model_folder(bits=4, dtype="float16"), model_folder()
    adapter = make_adapter(quantized)
    with pytest.raises(ModelError, match=r"made for another base .* --base-mismatch allow"):
        result_of(fuse(dense, adapter, tmp_path / "fused", registry))
    report = result_of(fuse(dense, adapter, tmp_path / "fused", registry, any_base=True))
    assert len(report.notes) == 1 and "made for another base" in report.notes[0]
    tensors = {name: np.array(tensor) for name, tensor in tensor_file.load(adapter)[0].items()}
    path = "layers.0.attention.wv"
    want = (
        np.array(weights(dense)[f"{path}.weight"])
        + 2.0 * (tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"]).T
    )
    np.testing.assert_allclose(np.array(weights(tmp_path / "fused")[f"{path}.weight"]), want, atol=1e-6)


@pytest.mark.parametrize("dequantize", [False, True])
def test_fusing_tells_of_each_tensor_of_the_file_as_it_is_written(
    model_folder: MakeModel,
    make_adapter: Callable[..., Path],
    registry: Registry,
    tmp_path: Path,
    dequantize: bool,
) -> None:
    base = model_folder(bits=8)
    events = [*fuse(base, make_adapter(base), tmp_path / "fused", registry, dequantize=dequantize)]
    written = [event for event in events if isinstance(event, TensorWritten)]
    names = set(weights(tmp_path / "fused"))
    assert {event.name for event in written} == names and len(names) == len(written)
    assert [event.done for event in written] == [*range(1, len(names) + 1)]
    assert {event.count for event in written} == {len(names)}
