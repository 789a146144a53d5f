"""Recipe ``demo``: a small base model that comes along, tuned on the docstrings of the installed mlx.

``base/`` holds the model, ``demo.toml`` what is done with it, and
``MODEL_CARD.md`` what it is good for and how it was made.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlxlora_core.api import RecipeFile, hookimpl


@hookimpl
def mlxlora_recipes() -> Iterable[RecipeFile]:
    """The one recipe of this plugin."""
    return [
        RecipeFile(
            name="demo",
            summary="a small base model learns the docstrings of mlx",
            path=Path(__file__).parent / "demo.toml",
        )
    ]
