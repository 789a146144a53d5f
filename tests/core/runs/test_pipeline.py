"""What a run tells, does again and keeps; and that a stage of one's own is one object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.plugins import Registry
from mlxlora_core.runs import pipeline
from mlxlora_core.runs import plan as plan_module
from mlxlora_core.runs.context import Context
from mlxlora_core.runs.events import Event, RunStarted, StageDone, StageStarted
from mlxlora_core.runs.folder import RunFolder
from mlxlora_core.runs.plan import fingerprints, plan
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.recipe_source import read
from mlxlora_core.runs.report import write_report
from mlxlora_core.runs.report.facts import read_facts
from mlxlora_core.runs.stages import STAGES
from mlxlora_core.runs.stages.stage import Stage
from mlxlora_core.training.events import CheckpointSaved, Note, TrainingStarted, TrainReport, TrainResult

NAMES = [stage.name for stage in STAGES if stage.name != "export"]  # which this recipe does not ask for
RECIPE = """
[run]
folder = "{folder}"
[model]
torch_path = "{checkpoint}"
dtype = "float32"
[data]
use = "jsonl"
options = {{ path = "{data}" }}
[train]
iters = 4
batch_size = 2
steps_per_report = 2
[evaluate]
test_batches = 1
[generate]
prompts = ["A layer"]
num_tokens = 2
"""


class CountStage(Stage):
    """Counts the bytes of the adapter, where a seed is odd."""

    name = "count"
    builds_on = ("train",)

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.run.seed % 2 == 1

    def inputs(self, recipe: Recipe) -> Mapping[str, Any]:
        return {"tokens": recipe.generate.num_tokens}

    def outputs(self, folder: Path) -> list[str]:
        return ["count.txt"]

    def work(self, context: Context) -> Iterator[Event]:
        size = (context.path / "adapter" / "adapter.safetensors").stat().st_size
        (context.path / "count.txt").write_text(str(size))
        yield Note("counted")
        yield StageDone(self.name, {"bytes": size})


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, registry: Registry) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path / "run", checkpoint=tiny_checkpoint, data=tiny_data))
    return read(path, (), registry)


def done(events: list[Event]) -> list[str]:
    """The stages that were done."""
    return [event.stage for event in events if isinstance(event, StageDone)]


def test_a_run_tells_each_stage_and_what_its_training_tells(recipe: Recipe, registry: Registry) -> None:
    events = list(pipeline.run(recipe, registry, ["a runtime"]))
    assert events[0] == RunStarted(("a runtime",))
    assert done(events) == NAMES
    assert [event.stage for event in events if isinstance(event, StageStarted)] == NAMES
    training = events[events.index(StageStarted("train", skipped=False)) + 1 :]
    training = training[: next(i for i, event in enumerate(training) if isinstance(event, StageDone))]
    kinds = {type(event) for event in training}
    assert kinds >= {Note, TrainingStarted, TrainReport, CheckpointSaved} and isinstance(
        training[-1], TrainResult
    )
    record = RunFolder(recipe.folder).record
    assert record["stages"]["train"]["result"]["steps"] == 4
    assert record["stages"]["train"]["files"].keys() == {"adapter/adapter.safetensors", "metrics.jsonl"}
    assert list(record["inputs"]) == NAMES and record["summary"]["losses"].keys() == {"valid", "test"}
    for stage in (stage for stage in STAGES if stage.name in NAMES):
        assert stage.words(record["stages"][stage.name]["result"]), stage.name

    again = list(pipeline.run(recipe, registry))
    assert done(again) == []
    assert [e for e in again if isinstance(e, StageStarted)] == [StageStarted(n, skipped=True) for n in NAMES]


def test_a_stage_is_done_again_when_one_that_it_builds_on_is(recipe: Recipe, registry: Registry) -> None:
    before = fingerprints(recipe)
    changed = {
        "model": replace(recipe, model=replace(recipe.model, dtype="float16")),
        "train": replace(recipe, train=replace(recipe.train, learning_rate=1.0)),
        "generate": replace(recipe, generate=replace(recipe.generate, num_tokens=3)),
        "seed": replace(recipe, run=replace(recipe.run, seed=3)),
        "checkpoints": replace(recipe, checkpoints=replace(recipe.checkpoints, keep=5)),
    }
    others = {
        name: [stage for stage, mark in fingerprints(new).items() if mark != before[stage]]
        for name, new in changed.items()
    }
    assert others == {
        "model": ["model", "before", "train", "after"],
        "train": ["train", "after"],
        "generate": ["before", "after"],
        "seed": ["before", "train", "after"],
        "checkpoints": [],
    }


def test_what_a_run_writes_agrees_with_its_description(recipe: Recipe, registry: Registry) -> None:
    list(pipeline.run(recipe, registry))
    folder = RunFolder(recipe.folder)
    assert folder.faults == [] and folder.record == json.loads((recipe.folder / "run.json").read_text())
    assert folder.record["summary"] and folder.record["stages"].keys() == folder.record["inputs"].keys()
    assert read_facts(recipe.folder).faults == ()


def test_a_stage_of_ones_own_is_one_entry(
    recipe: Recipe, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pipeline, plan_module):
        monkeypatch.setattr(module, "STAGES", (*STAGES, CountStage()))
    assert list(plan(recipe)) == NAMES, "this recipe does not ask for it"
    asked = replace(recipe, run=replace(recipe.run, seed=1))
    events = list(pipeline.run(asked, registry))
    assert done(events) == [*NAMES, "count"] and events[-2] == Note("counted")
    record = json.loads((asked.folder / "run.json").read_text())
    assert record["stages"]["count"]["result"]["bytes"] == int((asked.folder / "count.txt").read_text())
    assert not any(plan(asked).values())
    (asked.folder / "count.txt").unlink()
    assert [stage for stage, will in plan(asked).items() if will] == ["count"]
    assert done(list(pipeline.run(asked, registry))) == ["count"]

    # A run that does not ask for it any more has a report all the same.
    list(pipeline.run(recipe, registry))
    assert "count" not in RunFolder(recipe.folder).record["inputs"]
    assert write_report(recipe.folder).is_file()


def test_rows_beside_those_of_the_builder(recipe: Recipe, registry: Registry, tmp_path: Path) -> None:
    extra, general = tmp_path / "extra.jsonl", tmp_path / "general.jsonl"
    extra.write_text('{"text": "The sea is blue."}\n{"text": "A week has seven days."}\n')
    general.write_text('{"text": "The sun is warm."}\n')
    text = (tmp_path / "recipe.toml").read_text()
    text = text.replace("[data]\n", '[data]\nextra_rows = "extra.jsonl"\n')
    text = text.replace("[evaluate]\n", '[evaluate]\ngeneral_rows = "general.jsonl"\n')
    (tmp_path / "recipe.toml").write_text(text)
    added = read(tmp_path / "recipe.toml", (), registry)

    list(pipeline.run(added, registry))
    record = RunFolder(added.folder).record
    train = (added.folder / "data" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in train[-2:]] == ["The sea is blue.", "A week has seven days."]
    assert record["summary"]["losses"].keys() == {"valid", "test", "general"}
    again = read(added.folder / "recipe.toml", (), registry)
    assert done(list(pipeline.run(again, registry))) == []

    extra.write_text('{"text": "The sea is deep."}\n')
    assert done(list(pipeline.run(added, registry)))[0] == "data"
    assert "The sea is deep." in (added.folder / "data" / "train.jsonl").read_text()
    general.write_text('{"text": "The sun is very warm."}\n')
    assert done(list(pipeline.run(added, registry))) == ["before", "after"]
