"""Chunks of logits and gradient checkpointing change no curve, whatever trains on whatever base."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from small_models import FAMILIES, REGISTRY

from mlxlora_core.errors import ResourceError, UsageError
from mlxlora_core.machine import memory as machine_memory
from mlxlora_core.model import adapters, head_loss
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training import memory as training_memory
from mlxlora_core.training.batches import Collator
from mlxlora_core.training.checkpoints import Start
from mlxlora_core.training.events import Note, TrainReport, ValidReport
from mlxlora_core.training.gradient import Gradients
from mlxlora_core.training.memory import decide_recompute
from mlxlora_core.training.outputs import Outputs
from mlxlora_core.training.session import NewAdapter, TrainingSession, open_training
from mlxlora_core.training.settings import SaveConfig, TrainConfig
from mlxlora_core.training.sources import read_data

TEXTS = [f"{'the layer scales ' * (1 + n % 4)}its weights {n}." for n in range(9)]
ROWS = {"train": [{"text": text} for text in TEXTS], "valid": [{"text": text[4:]} for text in TEXTS[:3]]}
ADAPTERS = sorted(component.spec.name for component in REGISTRY.of("adapter"))
#: adapters that can go on an embedding; the others go on the head alone
EMBEDDED = ("lora", "lora-plus", "rslora")
DRAWING = ("lora", "lora-plus", "dora", "vera")
#: a chunk has 7 rows of these small vocabularies
CHUNK_BYTES = 4 * 320 * 7

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
EVERY = [
    *((family, "lora", bits) for family in FAMILIES for bits in (0, 4)),
    *(("llama", name, bits) for name in ADAPTERS if name != "lora" for bits in (0, 4)),
]
#: by day each in one of the two forms, in turn
CASES = EVERY if ALL else [case for i, case in enumerate(EVERY) if i % 4 in (0, 3)]


@pytest.fixture
def opened(family_model: Callable[[str, int], Model]) -> Callable[..., TrainingSession]:
    """A function that opens a training of both layers of a small model."""

    def make(
        family: str = "llama",
        adapter: str = "lora",
        bits: int = 0,
        dropout: float = 0.0,
        checkpoints: Path | None = None,
        **values: Any,
    ) -> TrainingSession:
        model = family_model(family, bits)
        aimed: dict[str, Any] = (
            {} if adapter == "ia3" else {"targets": targets(model.language_model, adapter)}
        )
        if dropout and adapter in DRAWING:
            aimed["dropout"] = dropout
        new = NewAdapter(*configure(REGISTRY.find("adapter", adapter), aimed))
        basic = {"iters": 6, "batch_size": 2, "learning_rate": 3e-3, "steps_per_report": 1}
        config = TrainConfig(**basic | {"steps_per_eval": 3} | values)
        outputs = Outputs(checkpoints=checkpoints, saving=SaveConfig(save_every=3))
        read = read_data(ROWS, ("train",), ("valid",))
        return open_training(model, new, read, config, REGISTRY, seed=1, outputs=outputs)

    return make


def targets(model: Any, adapter: str) -> tuple[str, ...]:
    """All linears, the head, and the embedding where the adapter goes on one."""
    head = ("lm_head",) if model.head_path else ()
    return ("all-linear", *head, *(("embed_tokens",) if adapter in EMBEDDED else ()))


def curve(session: TrainingSession, how: Start = Start.BEGIN) -> tuple[list[float], dict[str, bytes]]:
    """Losses of each step and validation, and what was trained."""
    events = list(session.start(how))
    losses = [event.loss for event in events if isinstance(event, TrainReport | ValidReport)]
    return losses, {n: bytes(memoryview(t)) for n, t in adapters.trainable(session.model.module).items()}


@pytest.mark.parametrize(("family", "adapter", "bits"), CASES)
def test_the_curve_is_the_same_step_by_step_with_chunks(
    opened: Callable[..., TrainingSession],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    adapter: str,
    bits: int,
) -> None:
    plain, _ = curve(opened(family, adapter, bits))
    monkeypatch.setattr(head_loss, "CPU_CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(head_loss, "GPU_CHUNK_BYTES", CHUNK_BYTES)
    chunks, _ = curve(opened(family, adapter, bits))
    # Rounding of the first steps grows in those that follow.
    assert chunks[:3] == pytest.approx(plain[:3], rel=1e-6)
    assert chunks == pytest.approx(plain, rel=3e-6)
    assert chunks != plain, "the chunks were not reached"
    assert plain[-1] != plain[0]


@pytest.mark.parametrize(("family", "adapter", "bits"), CASES)
def test_computed_again_every_bit_is_the_same(
    opened: Callable[..., TrainingSession], family: str, adapter: str, bits: int
) -> None:
    """Of what is trained as well, and of what dropout draws."""
    plain, values = curve(opened(family, adapter, bits, dropout=0.2, grad_checkpoint="off"))
    again, same = curve(opened(family, adapter, bits, dropout=0.2, grad_checkpoint="on"))
    assert again == plain and same == values
    assert plain[-1] != plain[0]


def test_it_goes_on_to_the_same_bits_with_and_without_recomputation(
    opened: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    _, whole = curve(opened(dropout=0.2))
    for event in opened(dropout=0.2, grad_checkpoint="on", checkpoints=tmp_path).start():
        if getattr(event, "step", 0) == 3 and type(event).__name__ == "CheckpointSaved":
            break
    _, rest = curve(opened(dropout=0.2, checkpoints=tmp_path), Start.RESUME)
    assert rest == whole


@pytest.mark.parametrize("values", [{"packing": "on"}, {"compile": "on"}, {"grad_accumulation": 2}])
def test_both_go_with_what_else_there_is(
    opened: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    plain, _ = curve(opened(**values))
    monkeypatch.setattr(head_loss, "CPU_CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(head_loss, "GPU_CHUNK_BYTES", CHUNK_BYTES)
    both, _ = curve(opened(**values, grad_checkpoint="on"))
    assert both == pytest.approx(plain, rel=1e-6) and both != plain


def test_what_draws_is_not_compiled_where_it_is_computed_again(
    opened: Callable[..., TrainingSession],
) -> None:
    """A compiled step knows no state of ``mx.random`` that it could go back to."""
    session = opened()
    model, collate = session.model.language_model, Collator(session.rows["train"].examples)
    model.layers[0].attention.wq = nn.Sequential(nn.Dropout(0.2), model.layers[0].attention.wq)
    model.train()
    found = []
    for compiled, recompute in ((False, False), (True, True)):
        gradients = Gradients(model, collate, 2, compiled, recompute)
        mx.random.seed(5)
        found.append(dict(tree_flatten(gradients([0, 1]).gradient)))
        assert gradients.compiles == 0
    assert all(mx.array_equal(tensor, found[1][name]) for name, tensor in found[0].items())


def notes(session: TrainingSession) -> list[str]:
    return [event.text for event in session.start() if isinstance(event, Note)]


def test_layers_are_computed_again_where_memory_is_short_and_it_is_told(
    opened: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not opened().training.recompute
    monkeypatch.setattr(training_memory, "has_room", lambda need: False)
    assert not opened(grad_checkpoint="off").training.recompute
    session = opened()
    assert session.training.recompute
    assert sum("computed again for their gradient" in text for text in notes(session)) == 1


def test_a_refusal_names_what_was_switched_off(
    opened: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = {way: opened(grad_checkpoint=way) for way in ("off", "auto")}
    monkeypatch.setattr(machine_memory, "_rooms", lambda root: [machine_memory._Room(0, 1000, "memory")])
    said = {}
    for way, session in sessions.items():
        with pytest.raises(ResourceError) as caught:
            list(session.start())
        said[way] = "--grad-checkpoint on" in str(caught.value)
    assert said == {"off": True, "auto": False}


def test_an_architecture_that_runs_all_layers_or_none_says_so() -> None:
    class Whole:
        def run(self, hidden: Any, cache: Any = None) -> Any:
            return hidden

    model: Any = SimpleNamespace(language_model=Whole())
    rows: Any = None
    assert not decide_recompute(model, rows, TrainConfig(grad_checkpoint="auto"))
    with pytest.raises(UsageError, match="grad_checkpoint cannot be on: this architecture runs all"):
        decide_recompute(model, rows, TrainConfig(grad_checkpoint="on"))
