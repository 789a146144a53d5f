"""The stage ``export``: the tuned model in the form of another tool, where a recipe names one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.runs.base import base_of
from mlxlora_core.runs.events import Event, StageDone
from mlxlora_core.runs.folder import ADAPTER, EXPORT, MODEL
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.stages.stage import Stage, identity_of
from mlxlora_core.training.events import Note

if TYPE_CHECKING:
    from mlxlora_core.runs.context import Context


class ExportStage(Stage):
    """The base with the adapter in its weights, by an exporter."""

    name = "export"
    builds_on = ("model", "train")

    def wanted(self, recipe: Recipe) -> bool:
        """Whether a recipe names an exporter."""
        return recipe.export is not None

    def inputs(self, recipe: Recipe) -> Mapping[str, Any]:
        """The exporter."""
        return {"exporter": identity_of(recipe.export)}

    def outputs(self, folder: Path) -> list[str]:
        """All files of the export."""
        files = (path for path in (folder / EXPORT).rglob("*") if path.is_file())
        return sorted(path.relative_to(folder).as_posix() for path in files)

    def work(self, context: Context) -> Iterator[Event]:
        """Export."""
        from mlxlora_core.model.adapters import AdapterFile
        from mlxlora_core.model.export import ExportReport, export

        recipe, path = context.recipe, context.path
        assert recipe.export is not None, "else this stage is not wanted"
        base, quantization = base_of(recipe, path / MODEL)
        events = export(
            base,
            path / EXPORT,
            recipe.export,
            context.registry,
            fused=AdapterFile(path / ADAPTER),
            quantization=quantization,
            overwrite=True,
        )
        for event in events:
            if isinstance(event, ExportReport):
                yield StageDone(self.name, asdict(event))
            else:
                yield Note(event.text)

    def words(self, result: Mapping[str, Any]) -> list[str]:
        """Where it is, and how large."""
        return [describe_export(result)]


def describe_export(result: Mapping[str, Any]) -> str:
    """An export in a line for a person."""
    files: Mapping[str, int] = result["files"]
    fused = f", with {result['adapter']} fused in" if result["adapter"] else ""
    return (
        f"{result['path']}: {result['parameters'] / 1e6:.3f} M parameters{fused}, by {result['exporter']}, "
        f"{len(files)} file{'s'[: len(files) - 1]} of {sum(files.values()) / 1e6:.1f} MB"
    )
