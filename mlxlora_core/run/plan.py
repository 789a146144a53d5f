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
from mlxlora_core.registry import Choice
from mlxlora_core.run.folder import RunFolder, files, fingerprint, stats
from mlxlora_core.run.recipe import Recipe

STAGES = ("model", "data", "before", "train", "after")


def plan(recipe: Recipe) -> dict[str, bool]:
    """stage -> whether a run would do it now; nothing is written."""
    folder = RunFolder(recipe.folder)
    return {stage: not folder.holds(stage, mark) for stage, mark in fingerprints(recipe).items()}


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """stage -> fingerprint of all that its output depends on."""
    config = recipe.train
    source = recipe.model.torch_path or recipe.model.mlx_path or Path()
    reading = {"max_seq_length": config.max_seq_length, "mask_prompt": config.mask_prompt}
    asking = {
        "reading": reading,
        "batch_size": config.batch_size,
        "evaluate": plain(recipe.evaluate),
        "generate": plain(recipe.generate),
        "sampler": _identity(recipe.sampler),
    }
    marks: dict[str, str] = {}
    marks["model"] = fingerprint(
        {
            "mlxlora": __version__,
            "model": plain(recipe.model),
            "files": stats(source, files(source)),
            "parts": [_identity(recipe.loader), _identity(recipe.quantize, recipe.quantize_config)],
        }
    )
    marks["data"] = fingerprint(
        {
            "mlxlora": __version__,
            "builder": _identity(recipe.data, recipe.data_config),
            "sources": dict(recipe.data.component.spec.inputs(recipe.data.options)),
        }
    )
    base = {"mlxlora": __version__, "on": [marks["model"], marks["data"]], "seed": recipe.run.seed}
    marks["before"] = fingerprint({**base, **asking})
    adapter = _identity(recipe.adapter, recipe.adapter_config)
    marks["train"] = fingerprint({**base, "train": plain(config), "adapter": adapter})
    marks["after"] = fingerprint({**base, **asking, "adapter": marks["train"]})
    return marks


def _identity(choice: Choice | None, config: Any = None) -> list[Any] | None:
    """A component, the version of its plugin, its options, and what its section holds beside them."""
    if choice is None:
        return None
    component = choice.component
    return [component.id, component.plugin.version, plain(choice.options), plain(config)]
