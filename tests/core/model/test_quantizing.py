"""A model that is quantized when it is opened is what converting makes, and never in memory dense."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import model_forms
import numpy as np
import pytest
import torch

from mlxlora_core.errors import ModelError, PluginError, ResourceError, UsageError
from mlxlora_core.machine import memory
from mlxlora_core.model import loading
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.model.linears import QuantizedEmbedding, dense_weight, is_packed, linears, parameters
from mlxlora_core.model.loading import Model
from mlxlora_core.options import NoOptions
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import Quantization, QuantizeConfig
from mlxlora_core.testing.stand_in import ROUNDING, choice

MakeModel = Callable[..., Path]
GGUF_CONFIG = model_forms.config(dim=256, hidden_dim=256, vocab_size=model_forms.GGUF_VOCAB)


def affine(registry: Registry, *, head: bool = False, **options: Any) -> Quantization:
    component = registry.find("quantizer", "affine")
    return Quantization(Choice(component, component.spec.options(**options)), QuantizeConfig(head=head))


def converted(source: Path, target: Path, registry: Registry, quantization: Quantization | None) -> Path:
    result_of(convert(source, target, registry, quantization=quantization))
    return target


@pytest.fixture(scope="session")
def sources(
    model_folder: MakeModel,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Dense models of every kind; read them, never write to them."""
    folder = tmp_path_factory.mktemp("sources")
    model_forms.write_gguf(folder / "dense.gguf", GGUF_CONFIG, ("F16", "BF16", "F16"), tied=True)
    model_forms.write_gguf(
        folder / "mixed.gguf", GGUF_CONFIG, ("Q4_K", "Q6_K", "F16", "Q8_0", "Q6_K"), tied=True
    )
    model_forms.write_gguf(folder / "packed.gguf", GGUF_CONFIG, ("Q4_K", "Q8_0"), tied=True)
    halves = Path(shutil.copytree(tiny_checkpoint, folder / "bfloat16"))
    theirs = torch.load(tiny_checkpoint / "consolidated.00.pth", weights_only=True)
    torch.save({name: t.bfloat16() for name, t in theirs.items()}, halves / "consolidated.00.pth")
    model_forms.write_hf(folder / "hf", model_forms.config(), dtype=torch.bfloat16)
    return {
        "model folder": model_folder(dtype="bfloat16"),
        "weights.npz": model_folder(dtype="float16", file_format="npz"),
        "Hugging Face": folder / "hf",
        "pth": tiny_checkpoint,
        "pth of bfloat16": halves,  # converting makes float16 of it
        "GGUF": folder / "dense.gguf",
        "mixed GGUF": folder / "mixed.gguf",
        "packed GGUF": folder / "packed.gguf",
    }


def assert_same(got: Model, want: Model) -> None:
    """Both have the same parameters to the bit, the same places for them, and one identity."""
    ours, theirs = parameters(got.module), parameters(want.module)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype), name
        assert mx.array_equal(ours[name].reshape(-1).view(mx.uint8), tensor.reshape(-1).view(mx.uint8)), name
    for path, module in want.module.named_modules():
        assert getattr(dict(got.module.named_modules())[path], "quantization", None) == getattr(
            module, "quantization", None
        )
    assert got.config == want.config and got.quantization == want.quantization
    assert got.fingerprint == want.fingerprint


@pytest.mark.parametrize(
    "kind", ["model folder", "weights.npz", "Hugging Face", "pth", "pth of bfloat16", "GGUF", "mixed GGUF"]
)
@pytest.mark.parametrize(
    "options", [{"group_size": 32}, {"group_size": 32, "bits": 8, "head": True}], ids=["4 bits", "8, head"]
)
def test_it_is_the_model_that_converting_makes(
    sources: dict[str, Path], registry: Registry, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    asked = affine(registry, **options)
    got = loading.load(sources[kind], registry, asked)
    want = loading.load(converted(sources[kind], tmp_path / "model", registry, asked), registry)
    assert_same(got, want)
    assert any(is_packed(linear) for _, linear in linears(got.module))
    assert loading.outline(sources[kind], registry, asked)[0].fingerprint == want.fingerprint
    assert got.fingerprint != loading.load(sources[kind], registry).fingerprint
    ids = mx.array([[1, 5, 7, 9]])
    assert mx.array_equal(got.language_model(ids), want.language_model(ids))


def test_what_each_weight_is_packed_in_is_what_mlx_makes_of_it(
    sources: dict[str, Path], registry: Registry
) -> None:
    dense = loading.load(sources["Hugging Face"], registry)
    got = loading.load(sources["Hugging Face"], registry, affine(registry, group_size=32, bits=8))
    weights = dict(linears(dense.module))
    for path, linear in linears(got.module):
        exact = dense_weight(weights[path]).astype(mx.bfloat16)
        if path == "output":
            assert not is_packed(linear)
            continue
        parts = mx.quantize(exact, group_size=32, bits=8)
        want = mx.dequantize(parts[0], *(p.astype(mx.float32) for p in parts[1:]), group_size=32, bits=8)
        assert mx.allclose(dense_weight(linear), want, rtol=1e-6, atol=1e-7), path
    (note,) = got.notes
    assert note.startswith("14 weights are quantized by affine (group_size 32, bits 8), relative error 0.")


def test_a_file_of_several_types_keeps_what_is_packed(registry: Registry, tmp_path: Path) -> None:
    """Weights of Q6_K are taken, the embedding too; those that MLX has the bits of stay as they are."""
    kinds = ("Q6_K", "Q4_K", "Q8_0")
    weights = model_forms.write_gguf(tmp_path / "model.gguf", GGUF_CONFIG, kinds, tied=True)
    before = loading.load(tmp_path / "model.gguf", registry)
    got = loading.load(tmp_path / "model.gguf", registry, affine(registry, bits=8))
    held = dict(before.module.named_modules())
    embedding: Any = dict(got.module.named_modules())["tok_embeddings"]
    assert isinstance(embedding, QuantizedEmbedding)
    found = dict(linears(got.module)) | {"tok_embeddings": embedding}
    taken = 0
    for path, linear in found.items():
        assert is_packed(linear), path
        weight = linear.dequantize()
        if is_packed(held[path]):
            assert mx.array_equal(weight, held[path].dequantize()), path
            assert linear.quantization.options.group_size == 32
            continue
        taken += 1
        assert (linear.quantization.options.group_size, linear.quantization.options.bits) == (64, 8)
        exact = weights[f"{path}.weight"].numpy().astype(np.float32)
        parts = mx.quantize(mx.array(exact), group_size=64, bits=8)
        assert mx.allclose(weight, mx.dequantize(*parts, group_size=64, bits=8), rtol=1e-6, atol=1e-7), path
    assert taken >= 5
    assert got.notes[-1].startswith(f"{taken} weights are quantized by affine (group_size 64, bits 8)")
    assert got.notes[-1].endswith(f"; {len(found) - taken} that were packed stay as they are")
    assert got.config["quantized"]["tok_embeddings"] != before.config["quantized"].get("tok_embeddings")


def test_a_folder_that_is_quantized_in_part_goes_on(
    model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    """The head of a model whose other linears are packed may be packed later, in other bits."""
    folder = model_folder(bits=4)
    got = loading.load(folder, registry, affine(registry, group_size=32, bits=8, head=True))
    assert {linear.quantization.options.bits for path, linear in linears(got.module)} == {4, 8}
    assert got.config["quantized"]["output"] == {"bits": 8}
    asked = affine(registry, group_size=32, bits=8, head=True)
    assert_same(got, loading.load(converted(folder, tmp_path / "model", registry, asked), registry))


# --- what there is nothing to do about ----------------------------------------


def refused(source: Path, registry: Registry, asked: Quantization, tmp_path: Path) -> UsageError:
    """The error that opening and converting end with, alike."""
    with pytest.raises(UsageError) as opened:
        loading.load(source, registry, asked)
    with pytest.raises(UsageError) as made:
        result_of(convert(source, tmp_path / "out" / "model", registry, quantization=asked))
    assert str(opened.value) == str(made.value) and not (tmp_path / "out" / "model").exists()
    return opened.value


def test_what_is_quantized_already_is_told(
    sources: dict[str, Path], model_folder: MakeModel, registry: Registry, tmp_path: Path
) -> None:
    for source in (sources["packed GGUF"], model_folder(bits=4)):
        fault = refused(source, registry, affine(registry), tmp_path)
        assert fault.what == f"{source} is quantized already" and "leave -q out" in fault.fix


def test_a_quantizer_that_takes_nothing_is_told(
    sources: dict[str, Path], registry: Registry, tmp_path: Path
) -> None:
    fault = refused(sources["pth"], registry, affine(registry, group_size=128), tmp_path)
    assert "nothing is quantized: quantizer 'affine' (group_size 128, bits 4) leaves all 14" in fault.what
    assert "--q-group-size" in fault.fix


def test_two_quantizers_in_one_model_are_refused(
    sources: dict[str, Path], registry: Registry, tmp_path: Path
) -> None:
    rounding = Quantization(choice("quantizer", ROUNDING, NoOptions()))
    fault = refused(sources["mixed GGUF"], registry, rounding, tmp_path)
    assert "has weights that 'affine' has packed" in fault.what


def test_a_quantizer_whose_parts_depend_on_the_numbers_is_named(
    sources: dict[str, Path], registry: Registry
) -> None:
    def of_zeros(weight: mx.array, options: NoOptions) -> dict[str, mx.array]:
        return {"whole": weight.astype(mx.int8), "step": mx.zeros((1, 1))}

    fickle = dataclasses.replace(ROUNDING, quantize=lambda w, o: None if mx.any(w != 0) else of_zeros(w, o))
    asked = Quantization(choice("quantizer", fickle, NoOptions()))
    registry = Registry(registry.plugins, [*registry.components, asked.choice.component])
    with pytest.raises(PluginError, match=r"other parts of layers\.0.* than of zeros in its shape and type"):
        loading.load(sources["model folder"], registry, asked)


def test_an_embedding_is_left_to_quantizers_that_pack_row_by_row(registry: Registry, tmp_path: Path) -> None:
    model_forms.write_gguf(tmp_path / "model.gguf", GGUF_CONFIG, ("Q6_K",), tied=True)
    asked = Quantization(choice("quantizer", ROUNDING, NoOptions()))
    registry = Registry(registry.plugins, [*registry.components, asked.choice.component])
    got = loading.load(tmp_path / "model.gguf", registry, asked)
    assert all(is_packed(linear) for _, linear in linears(got.module))
    assert "tok_embeddings.weight" in parameters(got.module)
    assert "left dense by the quantizer: tok_embeddings" in got.notes[-1]


@pytest.mark.parametrize("stated", [5, {"bits": "x"}, []])
def test_a_config_that_says_it_in_another_form_is_told(
    model_folder: MakeModel, registry: Registry, tmp_path: Path, stated: Any
) -> None:
    folder = Path(shutil.copytree(model_folder(bits=4), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text()) | {"quantization": stated}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        loading.load(folder, registry, affine(registry, head=True))


# --- memory -------------------------------------------------------------------

LAYERS, DIM = 20, 512
DENSE_BYTES = 2 * LAYERS * (3 * DIM**2 + 6 * DIM**2)
CHILD = """
import sys
from pathlib import Path
from mlxlora_core import plugins
from mlxlora_core.machine.device import prepare_cpu
from mlxlora_core.model import loading
from mlxlora_core.plugins.sections import Quantization, configure

prepare_cpu()
registry = plugins.load(environ={"MLXLORA_PLUGINS": ""})
asked = Quantization(*configure(registry.find("quantizer", "affine"), {"bits": 4}))

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])  # ru_maxrss has the peak of the parent in it

before = peak()
model = loading.load(Path(sys.argv[1]), registry, asked)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dense model of 95 MB, its largest weight a hundredth of that."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    config = model_forms.config(n_layers=LAYERS, dim=DIM, hidden_dim=2 * DIM)
    model_forms.write_hf(folder, config, dtype=torch.bfloat16)
    yield folder
    shutil.rmtree(folder)  # pytest keeps folders of earlier runs


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's peak")
@pytest.mark.parametrize("kind", ["Hugging Face", "model folder"])
def test_the_dense_model_is_never_in_memory(
    large: Path, registry: Registry, tmp_path: Path, kind: str
) -> None:
    """Most of what the process takes is the packed model, and float32 scales beside it on a CPU."""
    source = large if kind == "Hugging Face" else converted(large, tmp_path / "model", registry, None)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown > DENSE_BYTES / 4, "the packed model is in memory"
    assert grown < 0.65 * DENSE_BYTES, f"{grown / 1e6:.0f} MB for a dense model of {DENSE_BYTES / 1e6:.0f} MB"


def test_what_it_needs_of_memory_is_that_of_the_packed_model(
    large: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = int(0.9 * DENSE_BYTES)
    monkeypatch.setattr(memory, "_rooms", lambda root: [memory._Room(0, room, "memory")])
    with pytest.raises(ResourceError, match=r"the model needs about .*--quantize"):
        loading.load(large, registry)
    loading.load(large, registry, affine(registry, bits=4))
    monkeypatch.setattr(memory, "_rooms", lambda root: [memory._Room(0, 50_000_000, "memory")])
    with pytest.raises(ResourceError, match="the model needs about"):
        loading.load(large, registry, affine(registry, bits=4))
    monkeypatch.setattr(memory, "_rooms", lambda root: [memory._Room(0, 1_000_000, "memory")])
    with pytest.raises(ResourceError, match="quantizing needs about"):
        loading.load(large, registry, affine(registry, bits=4))
