"""What a run would do: its stages, and the fingerprint of what each depends on.

A fingerprint is made from what the stage says of its inputs and from the
fingerprints of the stages that it builds on. Nothing here loads MLX: a recipe
can be checked on any machine.
"""

from __future__ import annotations

from mlxlora_core.runs.folder import RunFolder, fingerprint
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.stages import STAGES
from mlxlora_core.runs.stages.stage import Stage
from mlxlora_core.version import __version__


def plan(recipe: Recipe) -> dict[str, bool]:
    """stage -> whether a run would do it now; nothing is written."""
    folder, marks = RunFolder(recipe.folder), fingerprints(recipe)
    wanted = (stage for stage in STAGES if stage.name in marks)
    return {stage.name: not is_done(stage, marks[stage.name], folder, recipe) for stage in wanted}


def is_done(stage: Stage, mark: str, folder: RunFolder, recipe: Recipe) -> bool:
    """Whether a stage was done for the inputs of a fingerprint, and what it left is there and sound."""
    return folder.holds(stage.name, mark) and stage.fits(folder.result(stage.name), recipe)


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """stage -> fingerprint of all that its output depends on, of the stages that the recipe asks for."""
    marks: dict[str, str] = {}
    for stage in (stage for stage in STAGES if stage.wanted(recipe)):
        on = [marks[name] for name in stage.builds_on]
        inputs = dict(stage.inputs(recipe))
        marks[stage.name] = fingerprint({"mlxlora": __version__, "on": on, "inputs": inputs})
    return marks
