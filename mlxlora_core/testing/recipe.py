"""The conformance suite of recipes that ship with a plugin.

Subclass :class:`RecipeSuite` in a test file and run it with pytest::

    class TestMyRecipe(RecipeSuite):
        spec = my_plugin.RECIPE
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.options import plain
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins import load as load_plugins
from mlxlora_core.runs import recipe_source
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.specs import RecipeFile


class RecipeSuite:
    """What every recipe must do.

    Attributes:
        spec: the recipe.
    """

    spec: RecipeFile

    # --- what the tests are made of ---

    def registry(self) -> Registry:
        """Where the components are looked up that the recipe names."""
        return load_plugins()

    def recipe(self) -> Recipe:
        """The recipe as ``mlxlora run`` reads it."""
        return recipe_source.read(self.spec.path, [], self.registry())

    def document(self) -> dict[str, Any]:
        """What stands in the file."""
        return tomllib.loads(self.spec.path.read_text("utf-8"))

    # --- the tests ---

    def test_the_file_is_there(self) -> None:
        """It lies in the plugin, wherever mlxlora is called."""
        assert self.spec.path.is_absolute(), "the path depends on the working folder"
        assert self.spec.path.is_file(), f"there is no {self.spec.path.name}"

    def test_every_section_key_and_component_is_known(self) -> None:
        """It is read without an error, with the plugins that are installed."""
        assert self.recipe().name

    def test_what_it_names_comes_along(self) -> None:
        """Every relative path in it that options read leads to a file or folder of the plugin."""
        told = list(_paths(plain(vars(self.recipe())), self.spec.path.parent))
        assert [path.name for path in told if not path.exists()] == []

    def test_rows_that_come_along_can_be_built(self) -> None:
        """What its dataset builder is to read out of the plugin gives rows."""
        recipe = self.recipe()
        options = plain(recipe.data.options)
        if not list(_paths(options, self.spec.path.parent)):
            pytest.skip("its rows are not in the plugin")
        assert recipe.data.component.spec.build(recipe.data.options).rows

    def test_it_names_nothing_of_one_machine(self) -> None:
        """No path in it is absolute: what is not in the plugin would be on its author's machine alone."""
        document = self.document()
        told = [*document.get("model", {}).values(), *document.get("data", {}).get("options", {}).values()]
        assert [one for one in told if isinstance(one, str) and Path(one).is_absolute()] == []

    def test_runs_write_where_the_user_stands(self) -> None:
        """The run folder is relative, so that nothing is written into the plugin."""
        folder = self.document().get("run", {}).get("folder", "")
        assert not Path(folder).is_absolute(), f"run.folder is {folder}"


def _paths(value: Any, folder: Path) -> Iterator[Path]:
    """The texts within plain values that are paths below ``folder``."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "origins":
                yield from _paths(item, folder)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item, folder)
    elif isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(folder):
        yield Path(value)
