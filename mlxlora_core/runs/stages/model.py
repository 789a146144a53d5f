"""The stage ``model``: convert the checkpoint, unless the recipe names a model to use as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.errors import ModelError
from mlxlora_core.files.fingerprints import content_digest
from mlxlora_core.model.events import describe_conversion
from mlxlora_core.model.located import LocatedModel, is_path, locate_model
from mlxlora_core.options import plain
from mlxlora_core.runs.base import source
from mlxlora_core.runs.events import Event, StageDone
from mlxlora_core.runs.folder import MODEL, files
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.stages.stage import Stage, identity_of

if TYPE_CHECKING:
    from mlxlora_core.runs.context import Context


class ModelStage(Stage):
    """The base as a model folder."""

    name = "model"

    def inputs(self, recipe: Recipe) -> Mapping[str, Any]:
        """The files of the model, and how they are converted.

        Raises:
            ModelError: there is no model at the path.
        """
        named = source(recipe.model)
        place = locate_model(named, fetch=False).path
        if is_path(named) and not os.path.exists(place):
            raise ModelError(
                "there is no such folder or file", where=place, fix="name the model's folder or file"
            )
        read = [place] if place.is_file() else [place / name for name in files(place)]
        return {
            "model": plain(recipe.model),
            "files": {path.name: content_digest(path) for path in read},
            "parts": [identity_of(recipe.loader), identity_of(recipe.quantize, recipe.quantize_config)],
        }

    def outputs(self, folder: Path) -> list[str]:
        """The model folder, where it was made."""
        return [f"{MODEL}/{name}" for name in files(folder / MODEL)]

    def work(self, context: Context) -> Iterator[Event]:
        """Convert."""
        model = context.recipe.model
        if model.torch_path is None:
            quantizer = context.recipe.quantize
            named = {"quantizer": quantizer.component.id} if quantizer is not None else {}
            yield StageDone(self.name, {"folder": str(model.mlx_path), **named})
        else:
            yield StageDone(self.name, _convert(locate_model(source(model)), context))

    def words(self, result: Mapping[str, Any]) -> list[str]:
        """The conversion, or the folder that is used."""
        if "loader" in result:
            return describe_conversion(result)
        packed = f", quantized by {result['quantizer']} when it is opened" if "quantizer" in result else ""
        return [f"uses {result['folder']}{packed}"]


def _convert(found: LocatedModel, context: Context) -> dict[str, Any]:
    """Convert a foreign model into the run folder; what there is to say of it."""
    from mlxlora_core.model.convert import convert
    from mlxlora_core.model.events import result_of

    recipe = context.recipe
    loader = recipe.loader
    events = convert(
        found.path,
        context.path / MODEL,
        context.registry,
        loader=loader.component.id if loader else None,
        loader_options=loader.options if loader else None,
        dtype=recipe.model.dtype,
        file_format=recipe.model.format,
        quantization=recipe.quantization,
        overwrite=True,
        name=found.name if found.revision else "",
    )
    return result_of(events).values()
