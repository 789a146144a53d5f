"""What a report is made of, read from a run folder: all that is sound, and what is not in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxlora_core.errors import DataError
from mlxlora_core.files.documents import parse_toml, read_settled
from mlxlora_core.files.forms import Map, Number, Option, Plain, Table, Text, Whole, sound
from mlxlora_core.files.input_file import read_whole
from mlxlora_core.runs.folder import METRICS, RECIPE, RECORD, RunFolder
from mlxlora_core.runs.recipe_source import RECIPE_BYTES
from mlxlora_core.runs.report.curves import Curves, Reports, read_curves

_SETTINGS = Table(
    {
        "iters": Option(Whole(least=1)),
        "warmup": Option(Whole()),
        "learning_rate": Option(Number()),
        "schedule": Option(Text()),
    }
)


@dataclass(frozen=True)
class Facts:
    """A run so far.

    Attributes:
        record: ``run.json``, as :data:`~mlxlora_core.runs.results.RECORD_FORM` describes it.
        recipe: ``recipe.toml``, section -> key -> value.
        results: stage -> what it found, of the stages that are done for this recipe.
        curves: what was reported of the training.
        faults: what is in the folder and could not be used, in words.
    """

    record: Mapping[str, Any]
    recipe: Mapping[str, Mapping[str, Any]]
    results: Mapping[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=Curves)
    faults: tuple[str, ...] = ()

    @property
    def train(self) -> Reports:
        """Reports of training in the order of their steps; only finite numbers."""
        return self.curves.train

    @property
    def valid(self) -> Reports:
        """Validations in the order of their steps."""
        return self.curves.valid

    @property
    def is_run(self) -> bool:
        """Whether more was done than to train, or is to be."""
        stages: Mapping[str, str] = self.record["inputs"]
        return stages.keys() != {"train"}

    @property
    def train_settings(self) -> Mapping[str, Any]:
        """The sound settings of ``[train]`` that a report says something about."""
        settings: Mapping[str, Any] = sound(_SETTINGS, self.recipe.get("train", {}))[0]
        return settings

    @property
    def steps(self) -> int:
        """The steps that the recipe asks for, or else those that were reported."""
        reported = max((report["step"] for report in (*self.train[-1:], *self.valid[-1:])), default=0)
        return int(self.train_settings.get("iters", reported))

    @property
    def seconds(self) -> float:
        """Wall time of the steps and validations that were reported."""
        seconds: float = sum(report.get("seconds", 0.0) for report in self.valid)
        before = 0.0
        for report in self.train:
            speed = report.get("steps_per_second", 0.0)
            seconds += (report["step"] - before) / speed if speed > 0 else 0.0
            before = report["step"]
        return seconds


def read_facts(folder: Path) -> Facts:
    """Read a run folder, whose run may still be going on.

    Raises:
        DataError: it is no run folder, its run.json cannot be read, or what
            stands in the place of one of its files is none.
    """
    run = read_settled(lambda: _begun(folder), folder / RECORD)
    record = run.record
    recipe, faults = _recipe(folder / RECIPE)
    inputs, stages = record["inputs"], record["stages"]
    results = {n: stage["result"] for n, stage in stages.items() if stage["inputs"] == inputs.get(n)}
    # Metrics of an earlier training stay until the next one begins.
    ours = "train" in inputs and record["started"].get("train") == inputs["train"]
    curves = read_settled(lambda: read_curves(folder / METRICS), folder / METRICS) if ours else Curves()
    return Facts(record, recipe, results, curves, (*run.faults, *faults))


def _begun(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    if not run.record:
        raise DataError("is no run folder", where=folder, fix="name the folder that mlxlora run has made")
    return run


def _recipe(path: Path) -> tuple[Mapping[str, Mapping[str, Any]], list[str]]:
    """The sections of a recipe, and what is wrong with it."""

    def read() -> Mapping[str, Any]:
        return parse_toml(read_whole(path, RECIPE_BYTES, DataError), path, DataError)[0]

    try:
        sections, faults = sound(Map(Map(Plain())), read_settled(read, path))
    except DataError as fault:
        if os.path.lexists(path) and not path.is_file():
            raise
        return {}, [str(fault)]
    return sections, [f"{path.name}: {fault}" for fault in faults]
