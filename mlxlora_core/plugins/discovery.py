"""Discover, load, isolate and find plugins; remember where each component came from.

Discovery has two phases: the metadata of entry-point group ``mlxlora`` is read
without importing anything, then each plugin is imported in a try of its own.
What fails is taken back whole and kept with its reason, so that a later "no
such component" can tell it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from mlxlora_core.errors import PluginError, UsageError, listing, nearest
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.signals import is_ours
from mlxlora_core.plugins.blame import files_of, guarded
from mlxlora_core.plugins.checks import collect_specs, reason_of
from mlxlora_core.plugins.lookup import Registry
from mlxlora_core.plugins.plugin import DISTRIBUTION, Component, Plugin, Status, normal_name
from mlxlora_core.plugins.surroundings import kept, refuse_endings

GROUP = "mlxlora"
ALLOW_LIST = "MLXLORA_PLUGINS"


#: the distribution, the name and value of an entry point, and how to import it
_Entry = tuple[importlib.metadata.Distribution | None, str, str, Callable[[], Any]]


def load(
    select: Iterable[str] = (), environ: Mapping[str, str] | None = None, *, tolerant: bool = False
) -> Registry:
    """Find and import the plugins.

    Args:
        select: ``NAME`` makes a plugin required, ``no:NAME`` leaves it out and
            ``./file.py`` adds a file; as given with ``-P``.
        environ: ``MLXLORA_PLUGINS`` in it is the list of plugins allowed beside
            the built-in ones; unset allows all, empty none. ``os.environ`` by default.
        tolerant: whether a name in that list that no plugin has is a warning.

    Raises:
        UsageError: a name after ``-P`` that no plugin has, or that is both
            required and left out.
        PluginError: a name in the list that no plugin has, or a plugin named
            with ``-P`` that cannot be loaded.
        ResourceError: a plugin named with ``-P`` finds too little memory, or another limit is reached.
    """
    environ = os.environ if environ is None else environ
    wanted, banned, files = _selection(select)
    found = _installed()
    _check_selection([plugin for plugin, _ in found], wanted, banned)
    allowed = _allow_list(environ)
    fault = _allow_list_fault([plugin for plugin, _ in found], allowed or ())
    if fault and not tolerant:
        raise PluginError(fault, fix=f"correct {ALLOW_LIST}, or see: mlxlora plugins")
    plugins: list[Plugin] = []
    components: list[Component] = []
    foreign: list[Plugin] = []
    for plugin, get in [*found, *map(_file_plugin, files)]:
        status = _chosen(plugin, wanted, banned, allowed)
        if status:
            plugins.append(replace(plugin, status=status[0], reason=status[1]))
            continue
        if plugin.origin != "built-in":
            foreign.append(plugin)
            if len(foreign) == 1:
                refuse_endings(lambda file: any(file in files_of(one) for one in foreign))
        plugin, gained = _load_one(plugin, get)
        plugins.append(plugin)
        components += gained
        if plugin.status == "error" and (
            plugin.origin == "file" or any(plugin.answers_to(name) for name in wanted)
        ):
            what = f"plugin {plugin} failed to load: {plugin.reason}"
            known = exhausted(plugin.fault) if plugin.fault else None
            raise known or PluginError(what, where=plugin.value) from plugin.fault
    return Registry(plugins, components, [fault] if fault else [])


# --- phase one: metadata ------------------------------------------------------


def discover() -> list[Plugin]:
    """The plugins that are installed, built-in ones first, by their metadata alone."""
    return [plugin for plugin, _ in _installed()]


def _installed() -> list[tuple[Plugin, Callable[[], Any]]]:
    """Every plugin in order, and how to import it."""
    return sorted(_discover(), key=lambda f: (f[0].origin != "built-in", _order(f[0])))


def _discover() -> list[tuple[Plugin, Callable[[], Any]]]:
    """The entry points of the group, each distribution's once, and how to import each."""
    seen = set()
    found = []
    told: dict[int, tuple[str, str]] = {}  # parsing metadata takes longer than importing a plugin
    for distribution, entry, value, get in _entries():
        if id(distribution) not in told:
            told[id(distribution)] = _told(distribution)
        name, version = told[id(distribution)]
        name = name or "unknown"
        if (normal_name(name), entry, value) in seen:
            continue
        seen.add((normal_name(name), entry, value))
        origin = "built-in" if normal_name(name) == DISTRIBUTION else "installed"
        found.append((Plugin(entry, name, version, origin, value), get))
    return found


def _entries() -> list[_Entry]:
    """Every entry point of the group, without importing any."""
    try:
        return [(e.dist, e.name, e.value, e.load) for e in importlib.metadata.entry_points(group=GROUP)]
    except Exception:
        # One distribution with damaged metadata, ours or not, and that call fails for all of them.
        return [entry for distribution in _distributions() for entry in _entries_of(distribution)]


def _distributions() -> Iterator[importlib.metadata.Distribution]:
    """Every distribution once: the first of its name on the path is the one that Python imports."""
    seen = set()
    for distribution in importlib.metadata.distributions():
        name = normal_name(_told(distribution)[0])
        if not name or name not in seen:
            seen.add(name)
            yield distribution


def _entries_of(distribution: importlib.metadata.Distribution) -> list[_Entry]:
    """The entry points of one distribution; one that fails with the reason if they cannot be read."""
    try:
        return [
            (distribution, e.name, e.value, e.load) for e in distribution.entry_points.select(group=GROUP)
        ]
    except Exception as fault:
        reason = reason_of(fault)

    def refuse() -> None:
        raise PluginError(f"its entry_points.txt cannot be read: {reason}")

    try:
        ours = f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or "")
    except Exception:
        ours = False
    return [(distribution, _told(distribution)[0], "entry_points.txt", refuse)] if ours else []


def _told(distribution: importlib.metadata.Distribution | None) -> tuple[str, str]:
    """Name and version of a distribution; nothing for what its metadata does not tell, damaged or not."""
    if distribution is None:
        return "", ""
    try:
        metadata = distribution.metadata
        name, version = (str(metadata[key]) if key in metadata else "" for key in ("Name", "Version"))
    except Exception:
        return "", ""
    return name, version


def _selection(select: Iterable[str]) -> tuple[list[str], list[str], list[Path]]:
    """Split what was given with -P into required names, banned names and files."""
    wanted, banned, files = [], [], []
    for text in select:
        if text.startswith("no:"):
            banned.append(text[3:])
        elif text.endswith(".py") or os.sep in text:
            files.append(Path(text))
        else:
            wanted.append(text)
    return wanted, banned, files


def _allow_list(environ: Mapping[str, str]) -> list[str] | None:
    if ALLOW_LIST not in environ:
        return None
    return [name.strip() for name in environ[ALLOW_LIST].split(",") if name.strip()]


def _allow_list_fault(found: Sequence[Plugin], allowed: Iterable[str]) -> str:
    """What is wrong with the names in the allow-list, or nothing."""
    unknown = [name for name in allowed if not any(plugin.answers_to(name) for plugin in found)]
    if not unknown:
        return ""
    names = [plugin.name for plugin in found]
    known = {*names, *(plugin.distribution for plugin in found)}
    hints = "".join(nearest(name, sorted(known)) for name in unknown)
    quoted = listing(f"'{name}'" for name in unknown)
    return f"{ALLOW_LIST} names no plugin: {quoted} ({hints}there is {listing(names, 30)})"


def _check_selection(found: Sequence[Plugin], wanted: Sequence[str], banned: Sequence[str]) -> None:
    """Refuse names that no plugin has, and plugins that are required and left out at once."""
    names = [plugin.name for plugin in found]
    for name in (*wanted, *banned):
        if not any(plugin.answers_to(name) for plugin in found):
            raise UsageError(
                f"-P names no plugin: '{name}' ({nearest(name, names)}there is {listing(names, 30)})",
                fix="see: mlxlora plugins",
            )
    for name in wanted:
        if all(any(p.answers_to(no) for no in banned) for p in found if p.answers_to(name)):
            raise UsageError(f"-P {name}: it is left out by -P no: as well", fix="give one of them")


def _chosen(
    plugin: Plugin, wanted: Sequence[str], banned: Sequence[str], allowed: Sequence[str] | None
) -> tuple[Status, str] | None:
    """Why ``plugin`` is not to be imported, or None when it is."""
    ban = next((name for name in banned if plugin.answers_to(name)), None)
    if ban is not None:
        # The distribution of the built-in plugins names all of them: -P no:mlxlora.
        return "disabled", f"-P no:{ban}"
    if plugin.origin != "installed" or allowed is None:
        return None
    if any(plugin.answers_to(name) for name in (*wanted, *allowed)):
        return None
    return "not selected", f"{ALLOW_LIST} does not list it"


def _file_plugin(path: Path) -> tuple[Plugin, Callable[[], Any]]:
    return Plugin(path.stem, "file", "", "file", str(path)), partial(_import_file, path)


# --- phase two: import --------------------------------------------------------


def _load_one(plugin: Plugin, get: Callable[[], Any]) -> tuple[Plugin, list[Component]]:
    """Import one plugin and collect its components; on any failure, none of them.

    It gets a plugin manager of its own, so that what fails takes nothing with
    it, and its prints go to stderr, since stdout holds results alone.
    """
    try:
        with kept(f"plugin {plugin}", look=plugin.origin != "built-in") as watch:
            watch.environ = True
            collected = [(kind, guarded(kind, spec, plugin)) for kind, spec in collect_specs(get())]
            watch.environ = False  # one that is loaded may have set variables
    except BaseException as fault:
        if is_ours(fault):
            raise
        return replace(plugin, status="error", reason=reason_of(fault), fault=fault), []
    plugin = replace(plugin, components=tuple((kind, spec.name) for kind, spec in collected))
    return plugin, [Component(kind, spec, plugin) for kind, spec in collected]


class _FreshLoader(SourceFileLoader):
    """Compiles a file each time: kept byte code is told by size and second, which an edit may leave."""

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        """Nothing that byte code could be told by."""
        raise OSError


def _import_file(path: Path) -> ModuleType:
    """The module in a file that was named with -P."""
    if not path.is_file():
        raise PluginError(f"no such file: {path}")
    # Two files of one name are two modules.
    unique = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"mlxlora_file_{path.stem}_{unique}", path)
    if spec is None or spec.loader is None:
        raise PluginError(f"not a Python file: {path}")
    if isinstance(spec.loader, SourceFileLoader):
        spec.loader = _FreshLoader(spec.name, os.path.abspath(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _order(plugin: Plugin) -> tuple[str, str, str]:
    return plugin.distribution, plugin.name, plugin.value
