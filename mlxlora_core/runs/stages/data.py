"""The stage ``data``: let the dataset builder make the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.files.fingerprints import content_digest
from mlxlora_core.options import plain
from mlxlora_core.runs.events import Event, StageDone
from mlxlora_core.runs.folder import DATA, files
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.stages.stage import Stage, identity_of, read_by
from mlxlora_core.training.dataset import build_dataset

if TYPE_CHECKING:
    from mlxlora_core.runs.context import Context

#: what run.json keeps of the record in dataset.json
_KEPT = ("rows", "groups", "repeated_rows", "rows_in_two_splits", "versions", "skipped")


class DataStage(Stage):
    """The rows, split."""

    name = "data"

    def inputs(self, recipe: Recipe) -> Mapping[str, Any]:
        """The builder, and what it says that it reads."""
        extra = recipe.data_config.extra_rows
        split = plain(recipe.data_config)
        del split["write_batch_size"]  # the bytes are the same
        return {
            "builder": identity_of(recipe.data),
            "split": split,
            "sources": read_by(recipe.data),
            "extra": content_digest(extra) if extra else None,
        }

    def outputs(self, folder: Path) -> list[str]:
        """The dataset folder."""
        return [f"{DATA}/{name}" for name in files(folder / DATA)]

    def work(self, context: Context) -> Iterator[Event]:
        """Build the dataset folder."""
        recipe = context.recipe
        record = build_dataset(recipe.data, recipe.data_config, context.path / DATA, overwrite=True)
        yield StageDone(self.name, {key: record[key] for key in _KEPT})

    def words(self, result: Mapping[str, Any]) -> list[str]:
        """How many rows."""
        rows = result["rows"]
        skipped = f", {len(result['skipped'])} skipped" if result["skipped"] else ""
        return [f"{rows['train']} train, {rows['valid']} valid, {rows['test']} test rows{skipped}"]
