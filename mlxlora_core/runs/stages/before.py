"""The stage ``before``: losses and answers of the base."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from mlxlora_core.runs.events import Event
from mlxlora_core.runs.stages.measure import MeasureStage

if TYPE_CHECKING:
    from mlxlora_core.model.loading import Model
    from mlxlora_core.runs.context import Context


class BeforeStage(MeasureStage):
    """The base, measured and asked."""

    name = "before"
    is_first = True
    builds_on = ("model", "data")

    def model(self, context: Context) -> Generator[Event, None, Model]:
        """The base."""
        return (yield from context.load_base())
