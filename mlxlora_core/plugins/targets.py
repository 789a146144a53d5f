"""What ``mlxlora plugins check`` is given: an installed plugin, a folder with a distribution, or a file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlxlora_core.errors import PluginError, UsageError, listing, nearest
from mlxlora_core.files.documents import parse_toml
from mlxlora_core.files.input_file import read_whole
from mlxlora_core.plugins.discovery import GROUP, discover
from mlxlora_core.plugins.plugin import Plugin

PROJECT = "pyproject.toml"
_TESTS, _SOURCES = "tests", ("", "src")
_PROJECT_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """A plugin to check.

    Attributes:
        name: of its entry point.
        distribution: who ships it.
        version: of the distribution.
        value: what the entry point names.
        root: the folder that its module is looked for in, where it need not be installed.
        folder: of the distribution, whose settings of pytest count, where there is one.
        tests: the folder of its author's tests, where there is one.
    """

    name: str
    distribution: str
    version: str
    value: str
    root: Path | None = None
    folder: Path | None = None
    tests: Path | None = None


def find_targets(text: str) -> list[Target]:
    """The plugins that a name or a path stands for; a path that is there comes first.

    Args:
        text: of an entry point, a distribution, a folder with a pyproject.toml, or a file that ends in .py.

    Raises:
        PluginError: there is no such plugin.
        UsageError: there is no such file, or the folder holds no plugin.
    """
    path = Path(text)
    if path.is_dir():
        return _of_folder(path.absolute())
    if path.is_file() or text.endswith(".py") or os.sep in text:
        return [_of_file(path)]
    found = [plugin for plugin in discover() if plugin.answers_to(text)]
    if not found:
        names = [plugin.name for plugin in discover()]
        raise PluginError(
            f"no plugin '{text}' ({nearest(text, names)}there is {listing(names, 30)}), and no such folder",
            fix="name a plugin of mlxlora plugins, a folder with a pyproject.toml, or a file .py",
        )
    return [_of_installed(plugin) for plugin in found]


def _of_installed(plugin: Plugin) -> Target:
    """A plugin that pip has installed; its tests are in the folder that it is edited in, or ship with it."""
    folder = _edited_folder(plugin)
    tests = _tests_in(folder) if folder is not None else _shipped_tests(plugin)
    return Target(plugin.name, plugin.distribution, plugin.version, plugin.value, folder=folder, tests=tests)


def _of_file(path: Path) -> Target:
    """The plugin in a file."""
    if not path.is_file():
        raise UsageError("there is no such file", where=path)
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UsageError(
            f"{path.name} cannot be imported by its name", where=path, fix="call it NAME.py, NAME one word"
        )
    return Target(path.stem, path.stem, "0", path.stem, root=path.absolute().parent)


def _of_folder(folder: Path) -> list[Target]:
    """The plugins of a distribution, by its pyproject.toml."""
    file = folder / PROJECT
    if not file.is_file():
        raise UsageError(f"there is no {PROJECT}", where=folder, fix="name the folder of a distribution")
    document, _ = parse_toml(read_whole(file, _PROJECT_BYTES, UsageError), file, UsageError)
    project = document.get("project", {})
    entries = project.get("entry-points", {}).get(GROUP, {}) if isinstance(project, dict) else {}
    if not isinstance(entries, dict) or not entries:
        raise UsageError(
            f"it has no entry point of group {GROUP}",
            where=file,
            fix=f"write [project.entry-points.{GROUP}], or install the distribution and check it by its name",
        )
    name, version = str(project.get("name", folder.name)), str(project.get("version", "0"))
    return [
        Target(entry, name, version, str(value), _root(folder, entry, str(value)), folder, _tests_in(folder))
        for entry, value in sorted(entries.items())
    ]


def _root(folder: Path, entry: str, value: str) -> Path:
    """The folder of a distribution that the module of an entry point stands in."""
    top = value.partition(":")[0].partition(".")[0]
    for root in (folder / source for source in _SOURCES):
        if (root / top).is_dir() or (root / f"{top}.py").is_file():
            return root
    raise UsageError(
        f"the module {top} of entry point '{entry}' is neither in this folder nor in src",
        where=folder / PROJECT,
        fix="correct the entry point, or pip install -e the distribution and check it by its name",
    )


def _tests_in(folder: Path) -> Path | None:
    """The tests in a folder, where there are any."""
    return folder / _TESTS if (folder / _TESTS).is_dir() else None


def _shipped_tests(plugin: Plugin) -> Path | None:
    """The tests that ship within the package of a plugin of somebody else, where there are any."""
    spec = package_spec(plugin) if plugin.origin != "built-in" else None
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    return next(filter(None, map(_tests_in, map(Path, places))), None)


def package_spec(plugin: Plugin) -> ModuleSpec | None:
    """Where the package of a plugin, or its only module, lies; None where it cannot be found."""
    with suppress(ImportError, ValueError):
        return importlib.util.find_spec(plugin.value.partition(":")[0].partition(".")[0])
    return None


def _edited_folder(plugin: Plugin) -> Path | None:
    """The folder of a plugin of somebody else that was installed by ``pip install -e``."""
    if plugin.origin == "built-in":
        return None
    with suppress(importlib.metadata.PackageNotFoundError, ValueError, TypeError):
        said = json.loads(
            importlib.metadata.distribution(plugin.distribution).read_text("direct_url.json") or "{}"
        )
        url = urlsplit(said.get("url", ""))
        if said.get("dir_info", {}).get("editable") and url.scheme == "file":
            return Path(url2pathname(url.path))
    return None
