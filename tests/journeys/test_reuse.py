"""Reuse of the frozen layers changes no curve, whatever trains on whatever base, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import FAMILIES, REGISTRY

from mlxlora_core.errors import SettingsChanged, UsageError
from mlxlora_core.files.leftovers import temporary_name
from mlxlora_core.machine.signals import Interrupted
from mlxlora_core.model import adapters
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training.checkpoints import Start, digest
from mlxlora_core.training.events import Note, TrainReport, ValidReport
from mlxlora_core.training.identity import BEFORE
from mlxlora_core.training.outputs import Outputs
from mlxlora_core.training.session import NewAdapter, TrainingSession, open_training
from mlxlora_core.training.settings import SaveConfig, TrainConfig
from mlxlora_core.training.sources import read_data

TEXTS = [f"{'the layer scales ' * (1 + n % 4)}its weights {n}." for n in range(9)]
ROWS = {"train": [{"text": text} for text in TEXTS], "valid": [{"text": text[4:]} for text in TEXTS[:3]]}
ADAPTERS = sorted(component.spec.name for component in REGISTRY.of("adapter"))
#: what each has that is random, so that a reuse must not shift what is drawn
VALUES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "dropout": 0.2},
    "lora-plus": {"rank": 4, "dropout": 0.2},
    "dora": {"rank": 4, "dropout": 0.2},
    "vera": {"rank": 8, "dropout": 0.2},
}
DEAD = 2**22 + 7


@pytest.fixture
def opened(family_model: Callable[[str, int], Model]) -> Callable[..., TrainingSession]:
    """A function that opens a training of the top layer of a small model."""

    def make(
        family: str = "llama",
        adapter: str = "lora",
        bits: int = 0,
        checkpoints: Path | None = None,
        targets: tuple[str, ...] = ("all-linear",),
        layers: int = 1,
        **values: Any,
    ) -> TrainingSession:
        model = family_model(family, bits)
        component = REGISTRY.find("adapter", adapter)
        aimed = {} if adapter == "ia3" else {"targets": targets}
        new = NewAdapter(*configure(component, {**VALUES.get(adapter, {}), **aimed, "layers": layers}))
        basic = {"iters": 12, "batch_size": 2, "learning_rate": 3e-3, "steps_per_report": 1}
        config = TrainConfig(**basic | {"steps_per_eval": 5, "patience": 20} | values)
        outputs = Outputs(checkpoints=checkpoints, saving=SaveConfig(save_every=4))
        read = read_data(ROWS, ("train",), ("valid",))
        return open_training(model, new, read, config, REGISTRY, seed=1, outputs=outputs)

    return make


def curve(session: TrainingSession, how: Start = Start.BEGIN) -> tuple[list[float], list[str]]:
    """Losses of each step and validation, and what was said of reuse."""
    events = list(session.start(how))
    losses = [event.loss for event in events if isinstance(event, TrainReport | ValidReport)]
    said = [event.text for event in events if isinstance(event, Note)]
    return losses, [line for line in said if line.startswith(("what ", "every step computes all "))]


CASES = [
    *((family, "lora", bits) for family in FAMILIES for bits in (0, 4)),
    *(("llama", name, bits) for name in ADAPTERS if name != "lora" for bits in (0, 4)),
]


@pytest.mark.parametrize(("family", "adapter", "bits"), CASES)
def test_the_curve_is_the_same_step_by_step(
    opened: Callable[..., TrainingSession], family: str, adapter: str, bits: int
) -> None:
    curves = {}
    for reuse in ("off", "auto"):
        curves[reuse], said = curve(opened(family, adapter, bits, reuse_prefix=reuse))
    # Rounding of the first steps grows in those that follow.
    assert curves["auto"][:4] == pytest.approx(curves["off"][:4], rel=1e-6)
    assert curves["auto"] == pytest.approx(curves["off"], rel=3e-6)
    assert curves["off"][-1] != curves["off"][0]
    layers = FAMILIES[family][1].get("n_layers", 2)
    assert said[0].startswith(f"what enters layer {layers} of {layers} is kept: {layers - 1} of {layers} ")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layers": -1}, "the lowest layer trains"),
        ({"targets": ("wq", "embed_tokens")}, "tok_embeddings.lora_a and 1 more trains, which no layer has"),
        ({"reuse_prefix": "off"}, "reuse_prefix is off"),
        ({"iters": 3}, "12 rows are read in all, and there are 12"),
        ({"targets": ("wq", "lm_head")}, ""),
        ({"targets": ("lm_head",)}, ""),
    ],
)
def test_one_line_says_what_it_saves_or_why_it_is_off(
    opened: Callable[..., TrainingSession], given: dict[str, Any], says: str
) -> None:
    said = curve(opened(**given))[1]
    assert len(said) == 1
    if says:
        assert said == [f"every step computes all 2 layers: {says}"]
    else:
        assert "is kept: " in said[0] and said[0].endswith(" MB in memory")


def test_on_where_it_cannot_be_is_refused_in_a_line(opened: Callable[..., TrainingSession]) -> None:
    with pytest.raises(UsageError) as caught:
        opened(reuse_prefix="on", layers=-1)
    assert str(caught.value) == "reuse_prefix cannot be on: the lowest layer trains. Fix: leave it at auto"


def kept_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "prefix" in str(path.parent.name)]


@pytest.mark.parametrize("end", ["done", "closed", "interrupted while filling", "interrupted in a step"])
def test_files_are_gone_however_it_ends(
    opened: Callable[..., TrainingSession], tmp_path: Path, end: str
) -> None:
    folder = tmp_path / "checkpoints"
    events = opened(checkpoints=folder, prefix_memory_mb=0).start()
    seen = 0
    try:
        for event in events:
            seen += bool(kept_files(folder))
            filling = getattr(event, "what", "") == "what enters layer 2"
            if end == "closed" and isinstance(event, TrainReport):
                break
            stepped = isinstance(event, TrainReport)
            if (end.endswith("filling") and filling) or (end.endswith("step") and stepped):
                os.kill(os.getpid(), signal.SIGINT)
    except Interrupted as fault:
        assert end.startswith("interrupted") and "step" in str(fault)
    del events
    assert seen
    assert [path.name for path in folder.glob(".*")] == []


def test_the_next_start_clears_away_what_a_kill_has_left(
    opened: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    left = tmp_path / temporary_name("prefix", DEAD, "tmp")
    left.mkdir()
    (left / "000000").write_bytes(bytes(1000))
    curve(opened(checkpoints=tmp_path, iters=1))
    assert not left.exists()


def test_files_or_memory_and_killed_or_not_it_is_the_same_to_the_bit(
    opened: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    whole = opened(checkpoints=tmp_path / "whole", patience=None)
    losses, _ = curve(whole)
    want = {name: bytes(memoryview(t)) for name, t in adapters.trainable(whole.model.module).items()}
    halves = opened(checkpoints=tmp_path / "halves", patience=None, prefix_memory_mb=0)
    for event in halves.start():
        if getattr(event, "step", 0) == 8 and type(event).__name__ == "CheckpointSaved":
            break
    again = opened(checkpoints=tmp_path / "halves", patience=None)
    rest, said = curve(again, Start.RESUME)
    assert "MB in memory" in said[0]
    assert rest == losses[-len(rest) :] and len(rest) > 3
    assert {n: bytes(memoryview(t)) for n, t in adapters.trainable(again.model.module).items()} == want


@pytest.mark.parametrize(("begun", "then"), [({"iters": 3}, {"iters": 9}), ({"iters": 9}, {"iters": 10})])
def test_what_was_settled_at_the_start_stays(
    opened: Callable[..., TrainingSession], tmp_path: Path, begun: dict[str, Any], then: dict[str, Any]
) -> None:
    """Of rows that a longer training would read more often, too."""
    curve(opened(checkpoints=tmp_path, patience=None, **begun))
    _, said = curve(opened(checkpoints=tmp_path, patience=None, **then), Start.RESUME)
    on = begun["iters"] == 9
    assert ("is kept: " in said[0]) == on
    if not on:
        assert said[0] == "every step computes all 2 layers: it was begun so"
    settings = json.loads(sorted(tmp_path.glob("step-*/MANIFEST.json"))[-1].read_text())["settings"]
    assert settings["reuse_prefix"] == ("on" if on else "off") and "prefix_memory_mb" not in settings


def test_a_checkpoint_of_before_goes_on_without(
    opened: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    grouped = {"checkpoints": tmp_path, "patience": None, "group_by_length": True}  # as it was then
    curve(opened(**grouped, iters=8, reuse_prefix="off"))
    for path in tmp_path.glob("step-*/MANIFEST.json"):
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        manifest["settings"] = {n: v for n, v in manifest["settings"].items() if n not in BEFORE}
        path.write_text(json.dumps({**manifest, "sha256": digest(manifest)}))
    with pytest.raises(SettingsChanged, match="packing"):
        curve(opened(**grouped, packing="on"), Start.RESUME)
    with pytest.raises(SettingsChanged, match="group_by_length"):
        curve(opened(**grouped | {"group_by_length": False}), Start.RESUME)
    _, said = curve(opened(**grouped), Start.RESUME)
    assert said == ["every step computes all 2 layers: it was begun so"]
