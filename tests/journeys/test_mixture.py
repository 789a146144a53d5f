"""A mixture of experts from end to end: a plugin's architecture, stacked linears, dense and quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxlora_core import plugins as registry
from mlxlora_core.files import tensor_file
from mlxlora_core.model import loading
from mlxlora_core.model.linears import dense_weight, linears

PLUGIN = Path(__file__).with_name("mixture_plugin.py")
DIM, HIDDEN, EXPERTS, LAYERS, VOCAB = 64, 32, 4, 2, 320
SHAPES = {
    "router": (EXPERTS, DIM),
    "up": (EXPERTS, HIDDEN, DIM),
    "down": (EXPERTS, DIM, HIDDEN),
}
TOKENS = np.array([[1, 5, 7, 9, 300, 17], [2, 4, 8, 16, 32, 64]])

Command = Callable[..., Any]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    """A random mixture in the layout of a PyTorch checkpoint."""
    draw = torch.Generator().manual_seed(0)
    shapes = {f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    shapes |= {"tok_embeddings": (VOCAB, DIM), "output": (VOCAB, DIM)}
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    weights = {
        f"{name}.weight": (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).half()
        for name, shape in shapes.items()
    }
    torch.save(weights, folder / "consolidated.00.pth")
    sizes = {"dim": DIM, "hidden": HIDDEN, "experts": EXPERTS, "n_layers": LAYERS, "vocab_size": VOCAB}
    (folder / "params.json").write_text(json.dumps({"model_type": "mixture", **sizes}))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer.read_bytes())
    return folder


def logits(weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The same model in numpy, one expert of one token at a time."""
    hidden = weights["tok_embeddings"][tokens]
    for layer in range(LAYERS):
        router, up, down = (weights[f"blocks.{layer}.{name}"] for name in SHAPES)
        out = hidden.copy()
        for place in np.ndindex(tokens.shape):
            x = hidden[place]
            scores = router @ x
            best = np.argsort(-scores)[:2]
            share = np.exp(scores[best] - scores[best].max())
            for expert, part in zip(best, share / share.sum(), strict=True):
                inner = up[expert] @ x
                out[place] = out[place] + part * (down[expert] @ (inner / (1 + np.exp(-inner))))
        hidden = out
    return hidden @ weights["output"].T


def expanded(model: Any) -> dict[str, np.ndarray]:
    """Every weight, as its parts have it."""
    weights = {path: dense_weight(linear) for path, linear in linears(model.module)}
    weights["tok_embeddings"] = model.language_model.tok_embeddings.weight
    return {name: np.array(weight.astype(mx.float32), np.float64) for name, weight in weights.items()}


@pytest.fixture
def plugins() -> registry.Registry:
    """The built-in plugins and the mixture."""
    return registry.load([str(PLUGIN)], environ={registry.ALLOW_LIST: ""})


def test_dense_and_quantized_experts_compute_what_their_weights_say(
    mlxlora: Command, checkpoint: Path, plugins: registry.Registry, tmp_path: Path
) -> None:
    exact = torch.load(checkpoint / "consolidated.00.pth", weights_only=True)
    for flags in ((), ("-q", "--q-bits", 8, "--q-group-size", 32)):
        folder = tmp_path / f"model{len(flags)}"
        arguments = ("--torch-path", checkpoint, "--mlx-path", folder, "--json", "-P", PLUGIN)
        done = mlxlora("convert", *arguments, *flags)
        assert done.code == 0, done.err
        report = json.loads(done.out)
        model = loading.load(folder, plugins)
        weights = expanded(model)
        np.testing.assert_allclose(
            np.array(model.language_model(mx.array(TOKENS))), logits(weights, TOKENS), atol=2e-4
        )
        for name, weight in weights.items():
            want = exact[f"{name}.weight"].double().numpy()
            assert np.linalg.norm(weight - want) <= (0.01 if flags else 0) * np.linalg.norm(want), name
    assert report["quantized"] == 3 * LAYERS and report["left_dense"] == []
    config = json.loads((folder / "config.json").read_text())
    assert config["quantized"] == {f"blocks.{i}.{name}": {} for i in range(LAYERS) for name in SHAPES}
    stored = tensor_file.load(folder / "model.safetensors")[0]
    assert stored["blocks.0.up.weight"].shape == (EXPERTS, HIDDEN, DIM * 8 // 32)
    assert stored["blocks.0.up.scales"].shape == (EXPERTS, HIDDEN, DIM // 32)


def test_a_quantized_mixture_is_measured_trained_fused_and_asked(
    mlxlora: Command, checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The default targets are all linears; the adapter takes the routers and leaves the experts alone."""
    model, adapter, fused = (tmp_path / name for name in ("model", "a.safetensors", "fused"))

    def run(*arguments: object) -> Any:
        done = mlxlora(*arguments, "--json", "-P", PLUGIN)
        assert done.code == 0, done.err
        return json.loads(done.out)

    quantizing = ("-q", "--q-bits", 8, "--q-group-size", 32)
    run("convert", "--torch-path", checkpoint, "--mlx-path", model, *quantizing)
    on_rows = ("--model", model, "--data", tiny_data)
    base = run("evaluate", *on_rows)
    sets = ("--set", "adapter.rank=2", "--set", "adapter.layers=1", "--iters", 10, "--learning-rate", 0.05)
    trained = run("train", *on_rows, "--adapter-file", adapter, *sets, "--test")
    assert trained["test"]["loss"] < base["loss"]
    record = json.loads(tensor_file.load(adapter)[1]["mlxlora"])
    assert record["paths"] == [f"blocks.{LAYERS - 1}.router"]
    assert record["config"] == {"targets": ["all-linear"], "layers": 1, "overrides": []}
    report = run("fuse", "--model", model, "--adapter-file", adapter, "--save-path", fused)
    assert report["linears"] == 1 and report["distance"] < 0.2 * report["base_distance"]
    alone = run("evaluate", "--model", fused, "--data", tiny_data)
    assert alone["loss"] == pytest.approx(trained["test"]["loss"], rel=0.01)
    assert run("generate", "--model", fused, "-p", "A layer", "-n", 2)["text"]
