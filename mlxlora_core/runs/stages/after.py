"""The stage ``after``: losses and answers of the tuned model."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from mlxlora_core.runs.events import Event
from mlxlora_core.runs.stages.measure import MeasureStage

if TYPE_CHECKING:
    from mlxlora_core.model.loading import Model
    from mlxlora_core.runs.context import Context


class AfterStage(MeasureStage):
    """The tuned model, measured and asked."""

    name = "after"
    builds_on = ("model", "data", "train")

    def model(self, context: Context) -> Generator[Event, None, Model]:
        """The base with the adapter on it."""
        return (yield from context.load_tuned())
