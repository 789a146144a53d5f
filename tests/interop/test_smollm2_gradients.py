"""LoRA on the two top layers of SmolLM2, over its weights in 4 bits: the gradients are torch's in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files
import llama_torch
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from model_forms import GGUF, MODULES
from smollm2_file import expanded

import mlxlora_core as mlxlora
from mlxlora_core.training.batches import Collator, make_batch
from mlxlora_core.training.examples import Example
from mlxlora_core.training.gradient import mean_gradient

TEXTS = [
    "The capital of France is Paris, and the capital of Germany is Berlin. Both lie on rivers: Paris on the "
    "Seine and Berlin on the Spree. Each of them has been a capital for several hundred years, with some "
    "interruptions, and each has more than two million inhabitants today, of whom many were born elsewhere.",
    "Gravity is the force that keeps the planets in orbit around the sun. It grows with the mass of both "
    "bodies and falls with the square of the distance between them, so that a planet twice as far away is "
    "drawn a quarter as strongly. Nobody has yet found anything that would keep gravity out of a room.",
]
SCALE, LAYERS, ADAPTED = 2.0, 30, (28, 29)
CONFIG: dict[str, Any] = {"n_heads": 9, "n_kv_heads": 3, "head_dim": 64, "norm_eps": 1e-5}
CONFIG |= {"rope_theta": 100000.0, "n_layers": 1}

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def layer(tensors: Tensors, number: int) -> dict[str, torch.Tensor]:
    """The weights of a layer, as if it were the first."""
    names = {
        ours: theirs[GGUF] for ours, theirs in MODULES.items() if f"blk.0.{theirs[GGUF]}.weight" in tensors
    }
    return {
        f"layers.0.{ours}.weight": torch.from_numpy(expanded(*tensors[f"blk.{number}.{theirs}.weight"]))
        for ours, theirs in names.items()
    }


def torch_gradients(
    tensors: Tensors,
    leaves: dict[str, torch.Tensor],
    inputs: torch.Tensor,
    places: torch.Tensor,
    targets: Any,
) -> float:
    """Differentiate the mean over some places in a batch; gives the mean."""
    embedding = torch.from_numpy(expanded(*tensors["token_embd.weight"]))
    x = embedding[inputs]
    for number in range(LAYERS):
        weights = layer(tensors, number)
        for path in {name.rpartition(".")[0] for name in leaves if name.startswith(f"layers.{number}.")}:
            name = f"layers.0.{path.split('.', 2)[2]}.weight"
            weights[name] = weights[name] + SCALE * (leaves[f"{path}.lora_a"] @ leaves[f"{path}.lora_b"]).T
        x = llama_torch.run(weights, x, CONFIG)
    norm = torch.from_numpy(expanded(*tensors["output_norm.weight"]))
    counted = x.flatten(0, 1)[places]
    logits = llama_torch.head({"norm.weight": norm, "tok_embeddings.weight": embedding}, counted, CONFIG)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    return float(loss.detach())


def test_gradients_are_torchs(smollm2: Path) -> None:
    model = mlxlora.load(smollm2).attach("lora", layers=len(ADAPTED), targets=["all-linear"])
    module: Any = model.base.module
    leaves, draw = {}, np.random.default_rng(0)
    for name, tensor in tree_flatten(module.trainable_parameters()):
        if name.endswith("lora_b"):
            tensor = mx.array(0.02 * draw.standard_normal(tensor.shape).astype(np.float32))
            module.load_weights([(name, tensor)], strict=False)
        leaves[name] = torch.tensor(np.array(tensor), dtype=torch.float64, requires_grad=True)
    assert len(leaves) == 2 * 7 * len(ADAPTED)
    examples = []
    for text in TEXTS:
        ids = np.array(model.base.tokenizer.encode(text, eos=True), np.uint32)
        examples.append(Example(ids, np.arange(len(ids)) > 0))
    assert sum(len(example.tokens) for example in examples) > 128
    loss, _, gradient = mean_gradient(model.base.language_model, Collator(examples), [0, 1], 2)

    _, tensors = gguf_files.read(smollm2.read_bytes())
    batch = make_batch(examples, [0, 1])
    inputs, places, targets = (
        torch.from_numpy(np.array(part).astype(np.int64))
        for part in (batch.inputs, batch.positions, batch.targets)
    )
    assert loss.mean == pytest.approx(torch_gradients(tensors, leaves, inputs, places, targets), abs=1e-5)
    got = dict(tree_flatten(gradient))
    assert got.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        largest = float(leaf.grad.abs().max())
        assert largest > 1e-5, name
        assert np.abs(np.array(got[name]) - leaf.grad.numpy()).max() <= 1e-4 * largest, name
