"""What a run would do: its stages, and the fingerprint of what each depends on.

The stages are model, data, before (losses and answers of the base), train and
after (the same of the tuned model). Each has a fingerprint made from the
fingerprints of those it builds on. Nothing here loads MLX: a recipe can be
checked on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxlora_core import __version__
from mlxlora_core.options import plain
from mlxlora_core.registry import Component
from mlxlora_core.run.folder import RunFolder, files, fingerprint, stats
from mlxlora_core.run.recipe import Choice, Recipe

STAGES = ("model", "data", "before", "train", "after")


def plan(recipe: Recipe) -> dict[str, bool]:
    """stage -> whether a run would do it now; nothing is written."""
    folder = RunFolder(recipe.folder)
    return {stage: not folder.holds(stage, mark) for stage, mark in fingerprints(recipe).items()}


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """stage -> fingerprint of all that its output depends on."""
    config = recipe.train
    source = recipe.model.torch_path or recipe.model.mlx_path or Path()
    builder = needed(recipe.data)
    reading = {"max_seq_length": config.max_seq_length, "mask_prompt": config.mask_prompt}
    asking = {
        "reading": reading,
        "batch_size": config.batch_size,
        "evaluate": plain(recipe.evaluate),
        "generate": plain(recipe.generate),
        "sampler": [_identity(sampler) for sampler in recipe.sampler],
    }
    marks: dict[str, str] = {}
    marks["model"] = fingerprint(
        {
            "mlxlora": __version__,
            "model": plain(recipe.model),
            "files": stats(source, files(source)),
            "parts": [_identity(recipe.loader), _identity(recipe.quantize)],
        }
    )
    marks["data"] = fingerprint(
        {
            "mlxlora": __version__,
            "builder": _identity(recipe.data),
            "sources": dict(builder.spec.inputs(recipe.data.options)),
        }
    )
    base = {"mlxlora": __version__, "on": [marks["model"], marks["data"]], "seed": recipe.run.seed}
    marks["before"] = fingerprint({**base, **asking})
    marks["train"] = fingerprint({**base, "train": plain(config), "adapter": _identity(recipe.adapter)})
    marks["after"] = fingerprint({**base, **asking, "adapter": marks["train"]})
    return marks


def needed(choice: Choice) -> Component:
    """The component of a part that a run cannot do without."""
    assert choice.component is not None, "the recipe reader fills this part in"
    return choice.component


def _identity(choice: Choice) -> list[Any] | None:
    """A component, the version of its plugin, and its options."""
    if choice.component is None:
        return None
    return [choice.component.id, choice.component.plugin.version, plain(choice.options)]
