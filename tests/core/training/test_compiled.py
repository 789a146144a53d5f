"""The step that is compiled, and the one whose loss is read late, against the plain one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora_core.errors import DivergedError
from mlxlora_core.model import adapters
from mlxlora_core.model.linears import QuantizedLinear, linear_shape, linears, parameters, replace
from mlxlora_core.model.loading import Model
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training import loop
from mlxlora_core.training.events import SpikeReport, TrainReport, ValidReport
from mlxlora_core.training.examples import Example
from mlxlora_core.training.loop import Training
from mlxlora_core.training.settings import TrainConfig

MakeExamples = Callable[..., tuple[Example, ...]]
MakeModel = Callable[..., Any]

VOCAB = 50
#: relative, of the loss of a step
CLOSE = 1e-6


def lengths(count: int, longest: int = 24) -> list[int]:
    draw = random.Random(1)
    return [draw.randrange(3, longest) for _ in range(count)]


def training(model: Any, examples: Any, valid: Any = (), seed: int = 0, **values: Any) -> Training:
    settings = {"iters": 6, "batch_size": 3, "learning_rate": 0.01, "steps_per_report": 1, **values}
    return Training(model, examples, valid, TrainConfig(**settings), seed)


def reports(work: Training) -> list[Any]:
    return [report for given in work for report in given]


def held(work: Training, model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Parameters and the state of the optimizer."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    return {name: np.array(tensor) for name, tensor in {**trained, **work.optimizer_tensors()}.items()}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)


def told(report: Any) -> Any:
    """A report without what takes time and memory."""
    kept = {k: v for k, v in vars(report).items() if "second" not in k and "bytes" not in k}
    return type(report).__name__, repr(kept)


# --- curves -------------------------------------------------------------------

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "max_position_embeddings": 512,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "mistral", "sliding_window": 7},
    "gemma": {
        **BASE,
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma 2": {
        **BASE,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "olmo2": {**BASE, "model_type": "olmo2"},
    "phi3": {**BASE, "model_type": "phi3"},
}
#: adapter -> options with which it goes on something
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ("wq", "w2", "tok_embeddings", "lm_head"), "rank": 4},
    "rslora": {"rank": 3},
    "lora-plus": {"rank": 4},
    "dora": {"targets": ("all-linear",), "rank": 4},
    "pissa": {"rank": 4},
    "ia3": {},
    "vera": {"rank": 12},
}


@pytest.fixture
def base(registry: Registry, tokenizer: CheckedTokenizer) -> Callable[..., Model]:
    """A function that makes a small model with an adapter on it, the same each time."""

    def make(architecture: str = "llama", adapter: str = "lora", bits: int | None = None) -> Model:
        raw = ARCHITECTURES[architecture]
        component = registry.find("architecture", architecture.split()[0])
        args = component.spec.layouts["hf"].read(raw, {"lm_head.weight": (VOCAB, 32)})
        mx.random.seed(3)
        module = component.spec.build(args)
        if bits is not None:
            affine = registry.find("quantizer", "affine")
            choice = Choice(affine, affine.spec.options(group_size=32, bits=bits))
            pack = affine.spec.quantize
            packed = {
                path: QuantizedLinear(choice, pack(linear.weight, choice.options), linear_shape(linear))
                for path, linear in linears(module)
                if path.startswith("layers.")
            }
            replace(module, packed)
        mx.eval(module.parameters())
        model = Model(Path("base"), module, tokenizer, plain(args), None, component, "", "")
        values = {"layers": -1, **ADAPTERS[adapter]} if architecture == "llama" else {"layers": -1}
        adapters.attach(model, *configure(registry.find("adapter", adapter), values), 0)
        return model

    return make


def check_curves(make: Callable[[], Any], examples: Any, **values: Any) -> None:
    """Six steps, compiled and not, have the same losses and norms."""
    plain = reports(training(make(), examples, compile="off", **values))
    work = training(make(), examples, compile="on", **values)
    compiled = reports(work)
    assert 2 <= work.compiles <= 12
    assert len(plain) == len(compiled) == 6
    for one, other in zip(plain, compiled, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=CLOSE)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert (other.trained_tokens, other.clipped) == (one.trained_tokens, one.clipped)
    assert plain[-1].loss != plain[0].loss


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_has_the_curve_of_the_plain_step(
    base: Callable[..., Model], make_examples: MakeExamples, adapter: str
) -> None:
    check_curves(lambda: base(adapter=adapter).language_model, make_examples(lengths(7)))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_the_curve_of_the_plain_step(
    base: Callable[..., Model], make_examples: MakeExamples, architecture: str, bits: int | None
) -> None:
    check_curves(lambda: base(architecture, bits=bits).language_model, make_examples(lengths(7)))
