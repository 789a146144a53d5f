"""What a GPU would do, done on the CPU: bfloat16, compiled, read late, tokens drawn ahead."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlxlora_affine.packing
import mlxlora_samplers.sampling
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora_core.machine import device
from mlxlora_core.model import adapters, drawing, generate, loading, ops
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training.batches import Collator
from mlxlora_core.training.examples import Example
from mlxlora_core.training.gradient import Gradients
from mlxlora_core.training.loop import Training
from mlxlora_core.training.settings import TrainConfig

#: what holds an adapter's numbers, which stay in float32
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ("all-linear", "tok_embeddings", "lm_head"), "rank": 4},
    "dora": {"targets": ("all-linear",), "rank": 4},
    "pissa": {"targets": ("all-linear",), "rank": 4},
    "ia3": {},
    "vera": {"targets": ("all-linear",), "rank": 12},
}
pytestmark = pytest.mark.usefixtures("as_on_a_gpu")
HALF = mx.bfloat16


@pytest.fixture
def opened(model_folder: Callable[..., Path], registry: Registry) -> Callable[..., Model]:
    """A function that opens the tiny model in bfloat16 and puts an adapter on it."""

    def make(adapter: str = "lora", bits: int | None = None) -> Model:
        model = loading.load(model_folder(dtype="bfloat16", bits=bits, head=bits is not None), registry)
        values = {"layers": -1, **ADAPTERS[adapter]}
        adapters.attach(model, *configure(registry.find("adapter", adapter), values), 0)
        return model

    return make


def rows(count: int = 7, seed: int = 0) -> tuple[Example, ...]:
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens = draw.integers(3, 320, draw.integers(4, 30)).astype(np.uint32)
        made.append(Example(tokens, np.arange(len(tokens)) > 0))
    return tuple(made)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_hidden_states_stay_in_half_precision_and_what_trains_in_float32(
    opened: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, adapter: str, bits: int | None
) -> None:
    model, types = opened(adapter, bits), {}
    for path, module in model.module.named_modules():
        if path and not path.endswith(("layers", "dropout")):
            spied(monkeypatch, type(module), path, types)
    sums = Gradients(model.language_model, Collator(rows()), 3, compiled=False)([0, 1, 2])
    assert sums.nats[0].dtype == mx.float32
    gradients = dict(tree_flatten(sums.gradient))
    assert {tensor.dtype for tensor in gradients.values()} == {mx.float32}
    assert all(np.isfinite(np.array(tensor)).all() for tensor in gradients.values())
    assert types and set(types.values()) == {HALF}


def spied(monkeypatch: pytest.MonkeyPatch, kind: Any, path: str, types: dict[str, Any]) -> None:
    """Note the type of what a kind of module gives."""
    if kind in (nn.Module, nn.Dropout):
        return
    inner = kind.__call__

    def call(self: Any, *arguments: Any, **more: Any) -> Any:
        result = inner(self, *arguments, **more)
        types[f"{path} {kind.__name__}"] = result.dtype
        return result

    monkeypatch.setattr(kind, "__call__", call)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_training_is_compiled_and_read_late_and_learns(
    opened: Callable[..., Model], bits: int | None
) -> None:
    settings = TrainConfig(iters=30, batch_size=3, learning_rate=0.01, steps_per_report=15, steps_per_eval=20)
    model = opened("lora", bits)
    training = Training(model.language_model, rows(), rows(3, seed=1), settings, 0)
    assert training.compiled
    losses = [report.loss for given in training for report in given if hasattr(report, "learning_rate")]
    assert losses[-1] < losses[0] - 0.2
    assert 2 <= training.compiles <= 12
    plain = TrainConfig(**{**vars(settings), "compile": "off"})
    other = Training(opened("lora", bits).language_model, rows(), rows(3, seed=1), plain, 0)
    again = [report.loss for given in other for report in given if hasattr(report, "learning_rate")]
    assert losses == pytest.approx(again, rel=0.01)  # bfloat16 rounds by 0.004


def test_packed_weights_that_are_expanded_compile_too(
    opened: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where many rows multiply."""
    monkeypatch.setattr(mlxlora_affine.packing, "on_cuda", lambda: True)
    monkeypatch.setattr(mlxlora_affine.packing, "CUDA_ROWS", 8)
    found = []
    for compile in ("on", "off"):
        settings = TrainConfig(iters=4, batch_size=3, learning_rate=0.01, steps_per_report=1, compile=compile)
        training = Training(opened("lora", 4).language_model, rows(), (), settings, 0)
        found.append([report.loss for given in training for report in given])
    assert found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize("samplers", [["greedy"], ["top-p"], ["repetition-penalty", "top-k"]], ids=str)
def test_text_is_the_same_drawn_ahead(
    opened: Callable[..., Model], registry: Registry, monkeypatch: pytest.MonkeyPatch, samplers: list[str]
) -> None:
    model = opened()
    chain = [(c, c.spec.options()) for c in (registry.find("sampler", name) for name in samplers)]

    def text() -> str:
        segments = generate.generate(
            model.language_model, model.tokenizer, "the weights", chain, num_tokens=40, seed=3
        )
        return generate.whole(segments).text

    assert device.runs_ahead()
    ahead = text()
    monkeypatch.setattr(drawing, "runs_ahead", lambda: False)
    assert text() == ahead and len(ahead) > 10


def test_top_p_leaves_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU sorts all of them."""
    transform = mlxlora_samplers.sampling.top_p(0.7, 0.9)
    for seed in range(5):
        logits = mx.random.normal((1, 2000), key=mx.random.key(seed)) * seed
        whole = transform(logits, ())
        with monkeypatch.context() as patch:
            patch.setattr(mlxlora_samplers.sampling, "on_cpu", lambda: True)
            assert mx.array_equal(whole, transform(logits, ()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_element_wise_functions_are_those_of_the_cpu(dtype: mx.Dtype) -> None:
    gate, up = (mx.random.normal((3, 50), key=mx.random.key(k)).astype(dtype) for k in (0, 1))
    for function, plain in ((ops.silu_times, ops._silu_times), (ops.gelu_times, ops._gelu_times)):
        got, want = function(gate, up), plain(gate, up)
        assert got.dtype == dtype
        close = 1e-6 if dtype == mx.float32 else 1e-2
        assert mx.allclose(got.astype(mx.float32), want.astype(mx.float32), rtol=close, atol=1e-6)
        assert math.isfinite(mx.grad(lambda g, f=function: f(g, up).sum())(gate).sum().item())
