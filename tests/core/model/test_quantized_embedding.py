"""An embedding that is packed in the file stays so, as input and as head, and computes what its bits say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora_core.errors import ModelError
from mlxlora_core.files import tensor_file
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.linears import QuantizedEmbedding, parameters
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import configure

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 5, 7, 9, 300, 17]])
EMBEDDING = "tok_embeddings"


def rewritten(folder: Path, change: Callable[[dict[str, mx.array]], None], quantized: bool) -> Path:
    """The folder with other tensors, its head tied to its embedding, and a table of what is packed."""
    tensors, _ = tensor_file.load(folder / "model.safetensors")
    mx.eval(tensors)
    tensors.pop("output.weight", None)
    change(tensors)
    (folder / "model.safetensors").unlink()
    tensor_file.save(folder / "model.safetensors", tensors.items(), {}, len(tensors))
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    if quantized:
        config |= {"quantizer": "affine", "quantization": {"group_size": 32, "bits": 8}}
        config["quantized"] = {EMBEDDING: {}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def both(model_folder: MakeModel, tmp_path: Path) -> tuple[Path, Path]:
    """A model whose embedding is packed in 8 bits, and one that has what the bits stand for, by numpy."""
    source = model_folder(dtype="float32")
    held: dict[str, mx.array] = {}

    def pack(tensors: dict[str, mx.array]) -> None:
        words, scales, biases = mx.quantize(tensors.pop(f"{EMBEDDING}.weight"), group_size=32, bits=8)
        held.update(words=words, scales=scales, biases=biases)
        tensors |= {
            f"{EMBEDDING}.weight": words,
            f"{EMBEDDING}.scales": scales,
            f"{EMBEDDING}.biases": biases,
        }

    def expand(tensors: dict[str, mx.array]) -> None:
        steps = np.array(held["words"]).view(np.uint8).astype(np.float64)
        scales, biases = (np.array(held[name]).astype(np.float64) for name in ("scales", "biases"))
        weight = steps * scales.repeat(32, 1) + biases.repeat(32, 1)
        tensors[f"{EMBEDDING}.weight"] = mx.array(weight.astype(np.float32))

    packed = rewritten(Path(shutil.copytree(source, tmp_path / "packed")), pack, quantized=True)
    return packed, rewritten(Path(shutil.copytree(source, tmp_path / "dense")), expand, quantized=False)


def test_it_computes_what_its_bits_stand_for(both: tuple[Path, Path], registry: Registry) -> None:
    packed, dense = (loading.load(folder, registry) for folder in both)
    held = packed.module["tok_embeddings"]
    assert isinstance(held, QuantizedEmbedding) and held.parts["weight"].dtype == mx.uint32
    embedded = packed.language_model.embed(TOKENS)
    assert mx.allclose(embedded, dense.language_model.embed(TOKENS), rtol=1e-6, atol=1e-7)
    got, want = packed.language_model(TOKENS), dense.language_model(TOKENS)
    assert float(mx.abs(got - want).max()) <= 1e-5 * float(mx.abs(want).max())
    last = packed.language_model.head(packed.language_model.run(embedded)[:, -1])  # one row, packed product
    assert float(mx.abs(last - want[:, -1]).max()) <= 1e-5 * float(mx.abs(want).max())
    weights = sum(tensor.size for tensor in parameters(dense.module).values())
    assert adapters.count(packed)["parameters"] == weights


def test_gradients_pass_through_it(both: tuple[Path, Path], registry: Registry) -> None:
    found = []
    for folder in both:
        model = loading.load(folder, registry)
        choice, config = configure(registry.find("adapter", "lora"), {"rank": 2})
        adapters.attach(model, choice, config, 3)
        module = model.module

        def loss(trained: dict[str, mx.array], module: object = module) -> mx.array:
            module.update(trained)  # type: ignore[attr-defined]  # an MLX module
            return module(TOKENS).square().mean()  # type: ignore[operator]  # an MLX module

        _, grads = mx.value_and_grad(loss)(module.trainable_parameters())
        found.append([g for _, g in sorted(tree_flatten(grads))])
    for got, want in zip(*found, strict=True):
        assert float(mx.abs(got - want).max()) <= 1e-4 * float(mx.abs(want).max()) + 1e-9


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_a_part_that_is_not_there_is_named(both: tuple[Path, Path], registry: Registry, part: str) -> None:
    tensors, _ = tensor_file.load(both[0] / "model.safetensors")
    mx.eval(tensors)
    del tensors[f"{EMBEDDING}.{part}"]
    (both[0] / "model.safetensors").unlink()
    tensor_file.save(both[0] / "model.safetensors", tensors.items(), {}, len(tensors))
    with pytest.raises(ModelError, match=rf"there is no tok_embeddings\.{part}"):
        loading.load(both[0], registry)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_on_a_gpu_it_gives_the_type_of_the_rest_of_the_model(
    registry: Registry, as_on_a_gpu: None, dtype: mx.Dtype
) -> None:
    """Another half precision would make both float32."""
    affine = registry.find("quantizer", "affine")
    choice = Choice(affine, affine.spec.options(group_size=32, bits=4))
    weight = mx.random.normal((50, 32)).astype(dtype)
    packed = affine.spec.quantize(weight, choice.options)
    assert QuantizedEmbedding(choice, packed, weight.shape)(mx.array([[1, 2]])).dtype == dtype
