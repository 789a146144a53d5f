"""What a run tells while it goes on; what its training tells is told as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxlora_core.runs.observing import ObserverFailed
from mlxlora_core.training.events import TrainEvent


@dataclass(frozen=True)
class RunStarted:
    """The run folder is there; ``notes`` is what the runtimes said, and what is odd in the folder."""

    notes: tuple[str, ...]


@dataclass(frozen=True)
class StageStarted:
    """A stage begins, or is skipped because its output holds; what is told until the next one is of it."""

    stage: str
    skipped: bool


@dataclass(frozen=True)
class StageDone:
    """A stage ended with ``result``, which run.json keeps."""

    stage: str
    result: Mapping[str, Any]


Event = RunStarted | StageStarted | StageDone | ObserverFailed | TrainEvent
