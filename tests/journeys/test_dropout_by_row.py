"""What rows drop is the same whatever they are computed beside: losses and adapters of whole trainings."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from small_models import REGISTRY

from mlxlora_core.machine.processors import THREADS
from mlxlora_core.model import adapters, head_loss
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training.events import Note, TrainReport
from mlxlora_core.training.session import NewAdapter, TrainingSession, open_training
from mlxlora_core.training.settings import TrainConfig
from mlxlora_core.training.sources import read_data

#: of very different lengths, so that there is padding
TEXTS = [f"{'the layer scales ' * (1 + n % 5)}its weights {n}." for n in range(11)]
#: that drop anything
DRAWING = sorted(
    component.spec.name
    for component in REGISTRY.of("adapter")
    if "dropout" in getattr(component.spec.options, "__dataclass_fields__", {})
)
#: each with what it is compared with, where that is not the plain way
WAYS: dict[str, dict[str, Any]] = {
    "parts": {"cores": "3"},
    "packed": {"packing": True},
    "accumulated": {"batch_size": 1, "grad_accumulation": 4},
    "computed again": {"grad_checkpoint": "on"},
    "reused": {"reuse_prefix": "on"},
    "compiled and computed again": {"compile": "on", "grad_checkpoint": "on"},
    "all": {"cores": "2", "packing": True, "batch_size": 2, "grad_accumulation": 2, "grad_checkpoint": "on"},
}
ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
#: by day every way with one adapter, and every adapter with one way
CASES = [
    (adapter, way)
    for adapter in DRAWING
    for way in WAYS
    if ALL or adapter == "lora" or (way == "all" and adapter != "rslora")
]

Found = tuple[list[float], dict[str, Any]]


@pytest.fixture
def trained(
    family_model: Callable[[str, int], Model], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[TrainingSession, Found]]:
    """Trains the upper layer of a small model and its head; losses of the steps, and the adapter."""

    def train(
        adapter: str = "lora", cores: str = "1", dropout: float = 0.3, chunk: int = 0, **values: Any
    ) -> tuple[TrainingSession, Found]:
        monkeypatch.setenv(THREADS, cores)
        monkeypatch.setattr(head_loss, "CPU_CHUNK_BYTES", chunk or 64 << 20)
        aimed = {"targets": ("all-linear", "lm_head"), "layers": 1, "dropout": dropout}
        new = NewAdapter(*configure(REGISTRY.find("adapter", adapter), aimed))
        basic = {"iters": 8, "batch_size": 4, "learning_rate": 3e-3, "steps_per_report": 1}
        config = TrainConfig(**basic | {"reuse_prefix": "off", "grad_checkpoint": "off"} | values)
        session = open_training(
            family_model("llama", 0), new, read_data({"train": [{"text": t} for t in TEXTS]}, ("train",)),
            config, REGISTRY, seed=3,
        )  # fmt: skip
        events = list(session.start())
        losses = [event.loss for event in events if isinstance(event, TrainReport)]
        notes = [event.text for event in events if isinstance(event, Note)]
        assert ("reuse_prefix" not in values) == any("every step computes all" in note for note in notes)
        found = adapters.trainable(session.model.module).items()
        return session, (losses, {name: np.array(tensor) for name, tensor in found})

    return train


def check(one: Found, other: Found) -> None:
    """Losses and adapters are the same but for rounding."""
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, tensor in one[1].items():
        np.testing.assert_allclose(tensor, other[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("adapter", "way"), CASES)
def test_every_way_to_compute_a_step_drops_the_same(trained: Any, adapter: str, way: str) -> None:
    _, plain = trained(adapter)
    session, found = trained(adapter, **WAYS[way])
    check(found, plain)
    if "compile" in WAYS[way]:
        assert session.training.compiles > 1


def test_a_head_in_chunks_drops_the_same(trained: Any) -> None:
    _, plain = trained()
    _, chunks = trained(chunk=4 * 320 * 7)
    check(chunks, plain)
    assert chunks[0] != plain[0], "the chunks were not reached"


def test_it_drops_something_and_the_state_of_mlx_has_no_part_in_it(trained: Any) -> None:
    _, plain = trained()
    _, without = trained(dropout=0.0)
    assert plain[0][0] != pytest.approx(without[0][0], rel=1e-3) or plain[0][1] != pytest.approx(
        without[0][1]
    )
    session, _ = trained()
    model = session.model.language_model
    model.train()
    state: Any = mx.random.state
    mx.random.seed(1)
    before = np.array(state[0])
    session.training._updates.make_update([0, 1], 0.0)
    assert np.array_equal(np.array(state[0]), before)
