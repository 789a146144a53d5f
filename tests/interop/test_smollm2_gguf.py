"""SmolLM2 out of its GGUF file, as it stands there, against figures that transformers computed in float64.

The figures: losses, greedy text and the ids of a chat, of the weights dequantized and
read by transformers 5.23; the losses are means over the tokens after the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.model import loading
from mlxlora_core.model.generate import decode
from mlxlora_core.model.linears import is_packed, linears
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins import load as load_registry

TEXTS = [
    (
        "The capital of France is Paris, and the capital of Germany is Berlin.",
        [504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 4521, 314, 11452, 30],
        1.7153528,
    ),
    (
        "Gravity is the force that keeps the planets in orbit around the sun.",
        [22007, 6463, 314, 260, 3075, 338, 8211, 260, 9244, 281, 8591, 1130, 260, 2388, 30],
        2.9326541,
    ),
]
GREEDY = [
    7042,
    30,
    198,
    198,
    504,
    2988,
    314,
    42,
    216,
    34,
    32,
    33,
    40,
    29,
    32,
    33,
    29,
    34,
    34,
    216,
    33,
    34,
    42,
]
GREEDY += [33, 34, 42, 37, 35, 30, 2]
CHAT = [
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
]
CHAT += [2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return loading.load(smollm2, load_registry(environ={"MLXLORA_PLUGINS": ""}))


def loss(model: Model, ids: Sequence[int]) -> float:
    """The mean over the tokens after the first, summed in float64."""
    logits = np.array(model.module(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-np.mean([logs[at, number] for at, number in enumerate(ids[1:])]))


def test_weights_stay_packed(model: Model) -> None:
    packed = [linear for _, linear in linears(model.module) if is_packed(linear)]
    assert len(packed) >= 210


@pytest.mark.parametrize(("text", "ids", "want"), TEXTS)
def test_ids_and_losses(text: str, ids: list[int], want: float, model: Model) -> None:
    assert model.tokenizer.encode(text) == ids
    assert abs(loss(model, ids) - want) < 1e-5


def greedy(model: Model, ids: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens one after another, the one that ends the text among them."""
    found = []
    draw = decode(
        model.module, ids, lambda logits, _: int(mx.argmax(logits).item()), num_tokens=count, stops=()
    )
    for token in draw:
        found.append(token)
        if token in model.tokenizer.stops:
            break
    return found


def test_greedy_text(model: Model) -> None:
    assert greedy(model, TEXTS[0][1][:5], 40) == GREEDY


def test_chat(model: Model) -> None:
    pieces = model.tokenizer.render([{"role": "user", "content": "What is the capital of France?"}])
    ids = [number for piece in pieces for number in piece.ids]
    assert ids == CHAT
    assert greedy(model, ids, 20) == ANSWER
