"""The stage ``export``: the tuned model in the form of another tool, where a recipe names one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.files.fingerprints import content_digest
from mlxlora_core.runs.base import base_of, source
from mlxlora_core.runs.events import Event, StageDone
from mlxlora_core.runs.folder import ADAPTER, DATA, EXPORT, MODEL
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.stages.stage import Stage, identity_of
from mlxlora_core.training.events import Note

if TYPE_CHECKING:
    from mlxlora_core.runs.context import Context


class ExportStage(Stage):
    """The base with the adapter in its weights, by an exporter."""

    name = "export"
    builds_on = ("model", "data", "before", "train", "after")

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
            base=source(recipe.model),
            facts=_facts(context),
        )
        for event in events:
            if isinstance(event, ExportReport):
                yield StageDone(self.name, asdict(event))
            else:
                yield Note(event.text)

    def words(self, result: Mapping[str, Any]) -> list[str]:
        """Where it is, and how large."""
        return [describe_export(result)]


def _facts(context: Context) -> list[str]:
    """How the adapter was trained, a line each for the card of the model."""
    from mlxlora_core.model.export_card import loss_facts

    train, data = context.recipe.train, context.folder.result("data")
    rows = context.path / DATA / "train.jsonl"
    return [
        f"data: {data['rows']['train']} rows, SHA-256 `{content_digest(rows)}`",
        f"{train.iters} steps of {train.batch_size * train.grad_accumulation} rows, {train.optimizer}, "
        f"learning rate {train.learning_rate:g} ({train.schedule})",
        *loss_facts(context.folder.result("before"), context.folder.result("after")),
    ]


def describe_export(result: Mapping[str, Any]) -> str:
    """An export in a line for a person."""
    files: Mapping[str, int] = result["files"]
    what = f"{result['parameters'] / 1e6:.3f} M parameters" if result["parameters"] else ""
    if result["adapter"]:
        what += f", with {result['adapter']} fused in" if what else f"{result['adapter']} alone"
    return (
        f"{result['path']}: {what}, by {result['exporter']}, {len(files)} file{'s'[: len(files) - 1]} of "
        f"{sum(files.values()) / 1e6:.1f} MB; {_describe_check(result)}"
    )


def _describe_check(result: Mapping[str, Any]) -> str:
    """What was found when the export was opened again."""
    check: Mapping[str, Any] | None = result["check"]
    if check is None:
        return "not checked, for no plugin reads this form"
    count = check["exact"] + check["rounded"]
    things = "tensors" if result["parameters"] else "updates"
    same = f"all {count} {things} as they were"
    if check["rounded"]:
        most = f"by {check['largest_rounding']:.2g} of their size at most"
        same = f"{check['rounded']} of {count} {things} rounded, {most}"
    return (
        f"opened again: {same}; logits of {check['tokens']} tokens are {check['distance']:.2g} of their size "
        f"from those of the model in memory, the largest difference is {check['largest_difference']:.2g}"
    )
