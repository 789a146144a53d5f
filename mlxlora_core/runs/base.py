"""The base of a run, which may be named by more than a path: found once, and pinned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlxlora_core.model.located import is_path, locate_model
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.runs.recipe import ModelConfig, Recipe


def pinned(recipe: Recipe, *, fetch: bool = True) -> tuple[Recipe, list[str]]:
    """A recipe whose model on the Hub is named by its commit, and what there is to tell of it.

    Args:
        recipe: with every value filled in.
        fetch: whether it is fetched where it is not in the cache.

    Raises:
        MlxloraError: as :func:`~mlxlora_core.model.located.locate_model`.
    """
    name = source(recipe.model)
    if is_path(name):
        return recipe, []
    found = locate_model(name, fetch=fetch)
    exact = Path(found.name)
    if recipe.model.torch_path is not None:
        model = replace(recipe.model, torch_path=exact)
    else:
        model = replace(recipe.model, mlx_path=exact)
    return replace(recipe, model=model), [*found.notes]


def source(model: ModelConfig) -> str:
    """What the model is named by."""
    named = model.torch_path or model.mlx_path
    assert named is not None, "one of them is stated"
    return str(named)


def base_of(recipe: Recipe, converted: Path) -> tuple[Path, Quantization | None]:
    """Where the base is, and how it is quantized when it is opened.

    Args:
        recipe: of the run.
        converted: the folder that the run converts to, where the recipe does not use a model as it is.
    """
    if recipe.model.mlx_path is None:
        return converted, None
    return locate_model(source(recipe.model)).path, recipe.quantization
