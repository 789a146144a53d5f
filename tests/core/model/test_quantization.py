"""What a quantizer gives is checked, and what it packed is found again in a model folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_core.errors import ModelError, PluginError, UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.model.fuse import fuse
from mlxlora_core.model.linears import QuantizedLinear, dense_weight, linears
from mlxlora_core.model.quantization import pack
from mlxlora_core.model.several import AdapterShare
from mlxlora_core.options import NoOptions
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import Quantization, configure
from mlxlora_core.testing.stand_in import ROUNDING, choice

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 5, 7, 9, 300, 17]])
WEIGHT = mx.random.normal((8, 16), key=mx.random.key(0))


def rounding(**functions: Any) -> Choice:
    """A quantizer of whole numbers, some of whose functions may be others."""
    return choice("quantizer", dataclasses.replace(ROUNDING, **functions), NoOptions())


def parts_of(weight: mx.array) -> dict[str, mx.array]:
    parts = ROUNDING.quantize(weight, NoOptions())
    assert parts is not None
    return dict(parts)


# --- what is checked ----------------------------------------------------------


def test_the_parts_and_what_they_stand_for() -> None:
    packed = pack(WEIGHT, rounding())
    assert packed is not None
    assert packed.parts.keys() == {"whole", "step"}
    assert mx.array_equal(packed.weight, ROUNDING.dequantize(packed.parts, NoOptions()))
    assert pack(WEIGHT, rounding(quantize=lambda weight, options: None)) is None


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a weight": (
        {"quantize": lambda w, o: w},
        "quantize gives array, wanted a mapping of its parts, or None",
    ),
    "a list": ({"quantize": lambda w, o: [w, w]}, "quantize gives list, wanted a mapping"),
    "a part less": (
        {"quantize": lambda w, o: {"whole": w}},
        "quantize gives parts whole, wanted whole, step",
    ),
    "a part more": (
        {"quantize": lambda w, o: parts_of(w) | {"bias": w}},
        "quantize gives parts whole, step, bias, wanted whole, step",
    ),
    "a part that is no array": (
        {"quantize": lambda w, o: {"whole": w, "step": 3.0}},
        "quantize gives float, wanted array",
    ),
    "a part that no file holds": (
        {"quantize": lambda w, o: parts_of(w) | {"step": mx.array(1j)}},
        "quantize gives step of type mlx.core.complex64, wanted a type that files hold",
    ),
    "another shape": (
        {"dequantize": lambda p, o: p["whole"].astype(mx.float32).T},
        "dequantize gives (16, 8) float32, wanted (8, 16) float32",
    ),
    "another type": (
        {"dequantize": lambda p, o: p["whole"]},
        "dequantize gives (8, 16) int8, wanted (8, 16) float32",
    ),
    "no array": ({"dequantize": lambda p, o: None}, "dequantize gives NoneType, wanted array"),
    "not a number": (
        {"dequantize": lambda p, o: p["whole"].astype(mx.float32) * mx.nan},
        "dequantize gives values that are not finite, wanted finite ones",
    ),
}


@pytest.mark.parametrize(("functions", "says"), BROKEN.values(), ids=BROKEN)
def test_what_a_quantizer_should_not_give_names_it(functions: dict[str, Any], says: str) -> None:
    with pytest.raises(PluginError) as caught:
        pack(WEIGHT, rounding(**functions))
    assert str(caught.value).startswith(f"quantizer tested:rounding: {says}")


def test_convert_tells_it_and_leaves_no_folder(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path
) -> None:
    """A quantizer that leaves the weight as it is, and says that it packed it, is not counted as one."""
    idle = rounding(
        parts=("weight",), quantize=lambda w, o: {"weight": w}, dequantize=lambda p, o: p["weight"]
    )
    with pytest.raises(PluginError, match=r"dequantize gives \(16, 32\) float16, wanted \(16, 32\) float32"):
        result_of(convert(tiny_checkpoint, tmp_path / "model", registry, quantization=Quantization(idle)))
    assert list(tmp_path.iterdir()) == []


def test_a_quantizer_that_takes_nothing_makes_no_model(
    tiny_checkpoint: Path, registry: Registry, tmp_path: Path
) -> None:
    asked: list[tuple[int, ...]] = []
    idle = rounding(quantize=lambda w, o: asked.append(w.shape))
    events = []
    with pytest.raises(UsageError) as caught:
        for event in convert(tiny_checkpoint, tmp_path / "model", registry, quantization=Quantization(idle)):
            events.append(event)
    assert events == [], "no tensor was written"
    assert len(asked) == len({*asked}) == 4, "each shape once, and no weight of the model"
    assert "nothing is quantized: quantizer 'rounding'" in caught.value.what
    assert "leaves all 14 linears as they are, which have 32, 64 inputs" in caught.value.what
    assert "leave -q out" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


# --- what is found again ------------------------------------------------------


@pytest.fixture
def copy(model_folder: MakeModel, tmp_path: Path) -> Path:
    """A quantized model folder that may be changed."""
    return Path(shutil.copytree(model_folder(bits=4), tmp_path / "copy"))


def change(folder: Path, values: Mapping[str, Any]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def store(folder: Path, tensors: dict[str, mx.array]) -> None:
    mx.eval(tensors)
    tensor_file.save(folder / "model.safetensors", sorted(tensors.items()), {}, len(tensors))


def test_a_folder_of_before_opens_with_the_same_bits(
    copy: Path, model_folder: MakeModel, registry: Registry
) -> None:
    """Without the list, packed is what has other parts than a weight and a bias."""
    want = loading.load(model_folder(bits=4), registry)
    got = loading.load(change(copy, {"quantized": None}), registry)
    kinds = {path: type(linear) for path, linear in linears(got.module)}
    assert [path for path, kind in kinds.items() if kind is not QuantizedLinear] == ["output"]
    assert mx.array_equal(got.language_model(TOKENS), want.language_model(TOKENS))


@pytest.mark.parametrize("mode", ["affine", None])
def test_the_mode_that_mlx_states_is_what_is_computed(
    copy: Path, model_folder: MakeModel, registry: Registry, mode: str | None
) -> None:
    stated = json.loads((copy / "config.json").read_text())["quantization"] | {"mode": mode}
    got = loading.load(change(copy, {"quantization": stated, "quantizer": None}), registry)
    want = loading.load(model_folder(bits=4), registry)
    assert mx.array_equal(got.language_model(TOKENS), want.language_model(TOKENS))


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "", 4, ["affine"]])
def test_another_mode_is_refused(copy: Path, registry: Registry, mode: Any) -> None:
    stated = json.loads((copy / "config.json").read_text())["quantization"] | {"mode": mode}
    with pytest.raises(ModelError, match=r"is quantized in mode .* which 'affine' does not read"):
        loading.load(change(copy, {"quantization": stated}), registry)


def test_the_fingerprint_of_a_folder_of_before_is_what_it_was(copy: Path, registry: Registry) -> None:
    """Adapters that were made for it still fit."""
    import hashlib

    model = loading.load(change(copy, {"quantized": None}), registry)
    config = json.loads((copy / "config.json").read_text())
    assert config.keys() >= {"quantizer", "quantization"} and "quantized" not in config
    del config["tokenizer_files"]  # they had none, and it tells nothing of the base
    tensors = tensor_file.fingerprint(tensor_file.load(copy / "model.safetensors")[0])
    parts = json.dumps([config, tensors, model.tokenizer.fingerprint], sort_keys=True)
    assert model.fingerprint == hashlib.sha256(parts.encode()).hexdigest()


def test_options_may_differ_from_linear_to_linear(
    copy: Path, model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    """One at 8 bits, one dense; the rest as before. Fusing quantizes each again as it was."""
    eight, dense = "layers.0.attention.wq", "layers.1.attention.wv"
    exact = tensor_file.load(model_folder() / "model.safetensors")[0]
    tensors = dict(tensor_file.load(copy / "model.safetensors")[0])
    affine = registry.find("quantizer", "affine")
    again = pack(exact[f"{eight}.weight"], Choice(affine, affine.spec.options(group_size=32, bits=8)))
    assert again is not None
    tensors |= {f"{eight}.{name}": part for name, part in again.parts.items()}
    del tensors[f"{dense}.scales"], tensors[f"{dense}.biases"]
    tensors[f"{dense}.weight"] = exact[f"{dense}.weight"]
    listed = json.loads((copy / "config.json").read_text())["quantized"]
    del listed[dense]
    store(copy, tensors)
    model = loading.load(change(copy, {"quantized": listed | {eight: {"bits": 8}}}), registry)
    found = dict(linears(model.module))
    assert mx.array_equal(dense_weight(found[eight]), again.weight)
    assert mx.array_equal(dense_weight(found[dense]), exact[f"{dense}.weight"])
    assert found["layers.0.attention.wv"].quantization.options.bits == 4
    assert found[eight].quantization.options.bits == 8

    adapted = adapters.attach(model, *configure(registry.find("adapter", "lora"), {"rank": 2}), 0)
    adapters.save(tmp_path / "a.safetensors", model, adapted)
    result_of(
        fuse(
            copy,
            [AdapterShare(adapters.AdapterFile(tmp_path / "a.safetensors"))],
            tmp_path / "fused",
            registry,
        )
    )
    fused = dict(linears(loading.load(tmp_path / "fused", registry).module))
    # The adapter changes nothing yet: 8 bits again are nearer than 4 could be.
    away = mx.linalg.norm(dense_weight(fused[eight]) - again.weight) / mx.linalg.norm(again.weight)
    assert away < 0.01
    assert fused[eight].quantization.options.bits == 8
    assert mx.array_equal(dense_weight(fused[dense]), exact[f"{dense}.weight"])


WQ = "layers.0.attention.wq"


@pytest.mark.parametrize(
    ("quantized", "says"),
    [
        ([WQ], "quantized must be a table of tables, by path"),
        ({WQ: 8}, "quantized must be a table of tables, by path"),
        ({"layers.9.attention.wq": {}}, "layers.9.attention.wq, which is no linear and no embedding"),
        ({"tok_embeddings": {}}, "there is no tok_embeddings.scales, tok_embeddings.biases"),
        ({WQ: {"bits": 7}}, "'bits': must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({WQ: {"bits": 8}}, f"{WQ}, have other parts"),
        ({"output": {}}, "there is no output.scales, output.biases"),
        ({WQ: {}}, "unknown: layers.0.attention.wk.biases"),
    ],
)
def test_a_list_that_is_not_that_of_the_weights_is_refused(
    copy: Path, registry: Registry, quantized: Any, says: str
) -> None:
    with pytest.raises(ModelError) as caught:
        loading.load(change(copy, {"quantized": quantized}), registry)
    assert says in str(caught.value)
