"""Discover, load, isolate and find plugins; remember where each component came from.

Discovery has two phases: the metadata of entry-point group ``mlxlora`` is read
without importing anything, then each plugin is imported in a try of its own.
What fails is taken back whole and kept with its reason, so that a later "no
such component" can tell it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pluggy

from mlxlora_core import hookspecs, specs
from mlxlora_core.errors import PluginError, UsageError, nearest, one_line, some
from mlxlora_core.options import NoOptions

GROUP = "mlxlora"
DISTRIBUTION = "mlxlora"
ALLOW_LIST = "MLXLORA_PLUGINS"

#: kind -> (the hook that gives it, the class of its specs)
KINDS: dict[str, tuple[str, type[specs.Spec]]] = {
    "loader": ("mlxlora_weight_loaders", specs.WeightLoader),
    "architecture": ("mlxlora_architectures", specs.Architecture),
    "adapter": ("mlxlora_adapters", specs.Adapter),
    "quantizer": ("mlxlora_quantizers", specs.Quantizer),
    "builder": ("mlxlora_dataset_builders", specs.DatasetBuilder),
    "sampler": ("mlxlora_samplers", specs.Sampler),
    "runtime": ("mlxlora_runtimes", specs.Runtime),
    "recipe": ("mlxlora_recipes", specs.RecipeFile),
}

Status = Literal["active", "disabled", "not selected", "error"]
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Plugin:
    """One entry point, or one file named with ``-P``, and what became of it.

    Attributes:
        name: the entry-point name.
        distribution: who ships it.
        version: of the distribution.
        origin: ``built-in``, ``installed`` or ``file``.
        value: what the entry point names, or the path of the file.
        status: ``active``, ``disabled``, ``not selected`` or ``error``.
        reason: why it is not active.
        components: (kind, name) of what it gives.
        trace: the traceback of an error.
    """

    name: str
    distribution: str
    version: str
    origin: str
    value: str
    status: Status = "active"
    reason: str = ""
    components: tuple[tuple[str, str], ...] = ()
    trace: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})".replace(" )", ")")

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is this plugin's entry point or its distribution."""
        return _normal(name) in (_normal(self.name), _normal(self.distribution))


@dataclass(frozen=True)
class Component:
    """A spec and the plugin that it came from."""

    kind: str
    spec: Any
    plugin: Plugin

    @property
    def id(self) -> str:
        """The full id ``plugin:name``, which is never ambiguous among differently named plugins."""
        return f"{self.plugin.name}:{self.spec.name}"


class Registry:
    """All plugins that were found, and the components of those that are active.

    Attributes:
        plugins: every plugin found, built-in ones first.
        components: of the active plugins, in the order of the plugins.
    """

    def __init__(self, plugins: Sequence[Plugin], components: Sequence[Component]) -> None:
        self.plugins = tuple(plugins)
        self.components = tuple(components)

    @property
    def failed(self) -> list[Plugin]:
        """The plugins that could not be loaded."""
        return [plugin for plugin in self.plugins if plugin.status == "error"]

    def of(self, kind: str) -> list[Component]:
        """The components of one kind."""
        return [component for component in self.components if component.kind == kind]

    def find(self, kind: str, name: str) -> Component:
        """The component that ``name`` or ``plugin:name`` stands for.

        Raises:
            PluginError: nothing has that name (the message tells what there is
                and which plugins failed to load), or several plugins give it.
        """
        owner, _, bare = name.rpartition(":")
        found = [
            component
            for component in self.of(kind)
            if component.spec.name == bare and (not owner or component.plugin.answers_to(owner))
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise PluginError(
                f"{kind} '{name}' is given by {some(str(c.plugin) for c in found)}",
                fix="write " + " or ".join(_unambiguous(c, found) for c in found),
            )
        known = sorted({component.spec.name for component in self.of(kind)})
        away = "".join(
            f"; plugin {plugin} failed to load: {plugin.reason}" for plugin in self.failed
        ) + "".join(
            f"; plugin {plugin} is {plugin.status}"
            for plugin in self.plugins
            if plugin.status in ("disabled", "not selected")
        )
        raise PluginError(
            f"no {kind} '{name}' ({nearest(bare, known)}there is {some(known, 20)}{away})",
            fix=f"install the plugin that gives it, or see: mlxlora components {kind}",
        )


def load(select: Iterable[str] = (), environ: Mapping[str, str] | None = None) -> Registry:
    """Find and import the plugins.

    Args:
        select: ``NAME`` makes a plugin required, ``no:NAME`` leaves it out and
            ``./file.py`` adds a file; as given with ``-P``.
        environ: ``MLXLORA_PLUGINS`` in it is the list of plugins allowed beside
            the built-in ones; unset allows all, empty none. ``os.environ`` by default.

    Raises:
        UsageError: a name after ``-P`` that no plugin has.
        PluginError: a plugin named with ``-P`` that cannot be loaded.
    """
    environ = os.environ if environ is None else environ
    wanted, banned, files = _selection(select)
    found = sorted(_discover(), key=lambda p: (p[0].origin != "built-in", p[0].distribution, p[0].name))
    for name in (*wanted, *banned):
        if not any(plugin.answers_to(name) for plugin, _ in found):
            names = [plugin.name for plugin, _ in found]
            raise UsageError(
                f"-P names no plugin: '{name}' ({nearest(name, names)}there is {some(names, 30)})",
                fix="see: mlxlora plugins",
            )
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugins: list[Plugin] = []
    components: list[Component] = []
    allowed = _allow_list(environ)
    for plugin, entry in [*found, *((_file_plugin(path), None) for path in files)]:
        status = _chosen(plugin, wanted, banned, allowed)
        if status:
            plugins.append(replace(plugin, status=status[0], reason=status[1]))
            continue
        plugin, gained = _load_one(manager, plugin, entry)
        plugins.append(plugin)
        components += gained
        if plugin.status == "error" and (
            plugin.origin == "file" or any(plugin.answers_to(name) for name in wanted)
        ):
            raise PluginError(f"plugin {plugin} failed to load: {plugin.reason}", where=plugin.value)
    return Registry(plugins, components)


def start_runtimes(registry: Registry) -> list[specs.RuntimeNote]:
    """Start every runtime, once a process, before MLX computes; return what they have to say.

    A runtime that raises is a warning and leaves the others alone.
    """
    notes = []
    for component in registry.of("runtime"):
        try:
            note = component.spec.start()
        except Exception as fault:
            note = specs.RuntimeNote(f"runtime {component.id} failed: {_reason(fault)}", warning=True)
        if note is not None:
            notes.append(note)
    return notes


# --- phase one: metadata ------------------------------------------------------


def _discover() -> list[tuple[Plugin, importlib.metadata.EntryPoint]]:
    """The entry points of the group, each distribution's once, without importing any."""
    seen = set()
    found = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        # An entry point whose metadata is damaged may have lost its distribution.
        distribution, version = "unknown", ""
        if entry.dist is not None:
            distribution = entry.dist.metadata["Name"] or "unknown"
            version = entry.dist.version or ""
        key = (_normal(distribution), entry.name, entry.value)
        if key in seen:
            continue
        seen.add(key)
        origin = "built-in" if _normal(distribution) == DISTRIBUTION else "installed"
        found.append((Plugin(entry.name, distribution, version, origin, entry.value), entry))
    return found


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


def _allow_list(environ: Mapping[str, str]) -> set[str] | None:
    if ALLOW_LIST not in environ:
        return None
    return {_normal(name) for name in environ[ALLOW_LIST].split(",") if name.strip()}


def _chosen(
    plugin: Plugin, wanted: Sequence[str], banned: Sequence[str], allowed: set[str] | None
) -> tuple[Status, str] | None:
    """Why ``plugin`` is not to be imported, or None when it is."""
    if any(plugin.answers_to(name) for name in banned):
        # The distribution of the built-in plugins names all of them: -P no:mlxlora.
        return "disabled", "-P no:" + plugin.name
    if plugin.origin != "installed" or allowed is None:
        return None
    if any(plugin.answers_to(name) for name in wanted):
        return None
    if allowed & {_normal(plugin.name), _normal(plugin.distribution)}:
        return None
    return "not selected", f"{ALLOW_LIST} does not list it"


def _file_plugin(path: Path) -> Plugin:
    return Plugin(path.stem, "file", "", "file", str(path))


# --- phase two: import --------------------------------------------------------


def _load_one(
    manager: pluggy.PluginManager, plugin: Plugin, entry: importlib.metadata.EntryPoint | None
) -> tuple[Plugin, list[Component]]:
    """Import one plugin and collect its components; on any failure, none of them."""
    key = f"{plugin.distribution}/{plugin.name}"
    try:
        module = entry.load() if entry is not None else _import_file(Path(plugin.value))
        version = getattr(module, "mlxlora_api", hookspecs.API_VERSION)
        if version != hookspecs.API_VERSION:
            raise PluginError(f"it needs plugin API {version}, this is {hookspecs.API_VERSION}")
        manager.register(module, key)
        collected = list(_collect(manager, module))
    except (Exception, SystemExit) as fault:
        if manager.has_plugin(key):
            manager.unregister(name=key)
        return replace(plugin, status="error", reason=_reason(fault), trace=traceback.format_exc()), []
    plugin = replace(plugin, components=tuple((kind, spec.name) for kind, spec in collected))
    return plugin, [Component(kind, spec, plugin) for kind, spec in collected]


def _import_file(path: Path) -> ModuleType:
    """The module in a file that was named with -P."""
    if not path.is_file():
        raise PluginError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"mlxlora_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise PluginError(f"not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def _collect(manager: pluggy.PluginManager, module: Any) -> Iterable[tuple[str, specs.Spec]]:
    """The checked specs of one registered plugin, kind by kind.

    Hooks are called plugin by plugin, because one that raises would take the
    results of all the others with it.
    """
    callers = manager.get_hookcallers(module) or []
    hooks = {hook for hook, _ in KINDS.values()}
    for caller in callers:
        if caller.name not in hooks:
            raise PluginError(
                f"unknown hook '{caller.name}' ({nearest(caller.name, hooks)}there is {some(sorted(hooks))})"
            )
    by_name = {caller.name: caller for caller in callers}
    for kind, (hook, wanted) in KINDS.items():
        if hook not in by_name:
            continue
        names: set[str] = set()
        for impl in by_name[hook].get_hookimpls():
            if impl.plugin is not module:
                continue
            for spec in _specs(hook, impl.function()):
                _check(spec, hook, wanted)
                if spec.name in names:
                    raise PluginError(f"{hook} gives '{spec.name}' twice")
                names.add(spec.name)
                yield kind, spec


def _specs(hook: str, given: Any) -> list[Any]:
    if isinstance(given, specs.Spec):
        return [given]
    if given is None or isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise PluginError(f"{hook} gives {type(given).__name__}, wanted an iterable of specs")
    return list(given)


def _check(spec: Any, hook: str, wanted: type[specs.Spec]) -> None:
    if not isinstance(spec, wanted):
        raise PluginError(f"{hook} gives {type(spec).__name__}, wanted {wanted.__name__}")
    if not isinstance(spec.name, str) or not _NAME.fullmatch(spec.name):
        raise PluginError(f"{hook}: name {spec.name!r} does not match {_NAME.pattern}")
    if not (isinstance(spec.options, type) and is_dataclass(spec.options)):
        raise PluginError(f"{hook}: options of '{spec.name}' is no dataclass")
    base: Any = wanted.options
    if base is not NoOptions and not issubclass(spec.options, base):
        raise PluginError(f"{hook}: options of '{spec.name}' must inherit {base.__name__}")
    for name, member in vars(spec).items():
        if str(wanted.__dataclass_fields__[name].type).startswith("Callable") and not callable(member):
            raise PluginError(f"{hook}: {name} of '{spec.name}' is not callable")


def _unambiguous(component: Component, among: Sequence[Component]) -> str:
    """The shortest full id that no other of ``among`` answers to."""
    same = [c for c in among if c.plugin.name == component.plugin.name]
    owner = component.plugin.name if len(same) == 1 else component.plugin.distribution
    return f"{owner}:{component.spec.name}"


def _reason(fault: BaseException) -> str:
    if isinstance(fault, SystemExit):
        return f"it called sys.exit({fault.code!r})"
    text = one_line(fault) if isinstance(fault, PluginError) else one_line(f"{type(fault).__name__}: {fault}")
    return text


def _normal(name: str) -> str:
    """A distribution or plugin name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
