"""Where a run writes, and whether it may: told before its first stage."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from mlxlora_core.errors import SafetyError, UsageError
from mlxlora_core.files import writable
from mlxlora_core.files.input_file import read_whole
from mlxlora_core.files.targets import is_written, paths_in, refuse_inputs
from mlxlora_core.model.located import locate_model
from mlxlora_core.runs.base import source
from mlxlora_core.runs.folder import ADAPTER, CHECKPOINTS, DATA, EXPORT, METRICS, MODEL, RECIPE, REPORT
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.report import is_report
from mlxlora_core.training.outputs import Outputs, check_outputs

_RECIPE_BYTES = 1 << 20


def check_run(recipe: Recipe, record: Mapping[str, Any]) -> None:
    """Refuse a run that would write over what it reads, or over what no run has written.

    Args:
        recipe: with every value filled in.
        record: what ``run.json`` in its folder holds; nothing where there is none.

    Raises:
        UsageError: a model or rows in the place of what the run makes of them.
        SafetyError: the folder, or a file in it, is of somebody else.
        ResourceError: it cannot be written.
    """
    folder = recipe.folder
    _refuse_other_folder(folder, record)
    inputs = _inputs(recipe)
    names = [DATA, CHECKPOINTS, ADAPTER, METRICS, REPORT, RECIPE]
    names += [MODEL] if recipe.model.torch_path else []
    names += [EXPORT] if recipe.export else []
    for name in names:
        refuse_inputs(folder / name, inputs)
    for name, ours in ((RECIPE, is_recipe), (REPORT, is_report)):
        writable.check_file(folder / name)
        is_written(folder / name, ours)
    check_outputs(Outputs(folder / ADAPTER, folder / CHECKPOINTS, folder / METRICS), inputs)


def is_recipe(path: Path) -> bool:
    """Whether a file is a recipe that a run has written: whole, and to the letter as a run writes it."""
    try:
        text = read_whole(path, _RECIPE_BYTES, UsageError).decode()
        held = tomllib.loads(text)
        return {"run", "model", "data", "adapter", "train"} <= held.keys() and tomli_w.dumps(held) == text
    except (UsageError, ValueError, RecursionError):
        return False


def _refuse_other_folder(folder: Path, record: Mapping[str, Any]) -> None:
    place = writable.place_of(folder)
    # A run that was killed in its checks leaves an empty folder.
    checked = (place / ADAPTER).parent
    if place.is_dir() and all(path == checked and _is_empty(path) for path in place.iterdir()):
        return
    if place.exists() and not (place.is_dir() and record):
        raise SafetyError(
            "holds something that is no run and was left alone",
            where=folder,
            fix="name another folder with --set run.folder=DIR",
        )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _inputs(recipe: Recipe) -> list[Path]:
    """What a run reads: its model, and every path that a component of it is told."""
    choices = [recipe.loader, recipe.quantize, recipe.data, recipe.adapter, recipe.export]
    choices += [*recipe.sampler, *recipe.observe]
    read = [path for choice in choices if choice is not None for path in paths_in(choice.options)]
    base = locate_model(source(recipe.model), fetch=False).path
    return [*read, base, *paths_in(recipe.evaluate)]
