"""Discover, load, isolate and find plugins; remember where each component came from.

Discovery has two phases: the metadata of entry-point group ``mlxlora`` is read
without importing anything, then each plugin is imported in a try of its own.
What fails is taken back whole and kept with its reason, so that a later "no
such component" can tell it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import pluggy

from mlxlora_core import hookspecs, specs
from mlxlora_core.cores import use_for_products
from mlxlora_core.errors import PluginError, UsageError, nearest, one_line, some
from mlxlora_core.options import NoOptions, check_declaration, explain
from mlxlora_core.signals import Interrupted

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

T = TypeVar("T")

Status = Literal["active", "disabled", "not selected", "error"]
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")

#: the distribution, the name and value of an entry point, and how to import it
_Entry = tuple[importlib.metadata.Distribution | None, str, str, Callable[[], Any]]

#: what a recipe writes beside the options of a component
_RESERVED = {"use", "options"}

#: annotation of a spec's field -> what its value must be, in words and as a test
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("text", lambda value: isinstance(value, str) and bool(value.strip())),
    "Path": ("a Path", lambda value: isinstance(value, Path)),
    "tuple[str, ...]": (
        "a tuple of texts",
        lambda value: isinstance(value, tuple) and all(isinstance(item, str) for item in value),
    ),
}


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
        fault: the exception behind an error, for its traceback.
    """

    name: str
    distribution: str
    version: str
    origin: str
    value: str
    status: Status = "active"
    reason: str = ""
    components: tuple[tuple[str, str], ...] = ()
    fault: BaseException | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})".replace(" )", ")")

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is this plugin's entry point, its distribution, or ``distribution/plugin``."""
        return _normal(name) in map(_normal, self.owners)

    @property
    def owners(self) -> tuple[str, str, str]:
        """What may stand before the colon of a full id, shortest first."""
        return self.name, self.distribution, f"{self.distribution}/{self.name}"


@dataclass(frozen=True)
class Component:
    """A spec and the plugin that it came from.

    Attributes:
        kind: a key of :data:`KINDS`.
        spec: what the plugin handed over.
        plugin: who handed it over.
        owner: what stands before the colon of its full id; the plugin's name
            unless the registry needs more to tell two plugins apart.
    """

    kind: str
    spec: Any
    plugin: Plugin
    owner: str = ""

    @property
    def id(self) -> str:
        """The full id ``plugin:name``; in a registry it stands for this component alone."""
        return f"{self.owner or self.plugin.name}:{self.spec.name}"

    def gave(self, function: str, value: Any, wanted: type[T]) -> T:
        """``value``, which ``function`` of the spec has returned.

        Raises:
            PluginError: it is not what the contract says.
        """
        if not isinstance(value, wanted):
            raise PluginError(
                f"{self.kind} {self.id}: {function} gives {type(value).__name__}, wanted {wanted.__name__}"
            )
        return value

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is this component's name or one of its full ids."""
        owner, _, bare = name.rpartition(":")
        return bare == self.spec.name and (not owner or self.plugin.answers_to(owner))


class Registry:
    """All plugins that were found, and the components of those that are active.

    Attributes:
        plugins: every plugin found, built-in ones first.
        components: of the active plugins, in the order of the plugins.
    """

    def __init__(self, plugins: Sequence[Plugin], components: Sequence[Component]) -> None:
        self.plugins = tuple(plugins)
        self.components = tuple(replace(c, owner=_owner(c, components)) for c in components)

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
        return self.find_all([(kind, name)])[0]

    def find_all(self, wanted: Sequence[tuple[str, str]]) -> list[Component]:
        """The components that (kind, name) pairs stand for.

        Raises:
            PluginError: as :meth:`find`, for all of them at once.
        """
        found = [[c for c in self.of(kind) if c.answers_to(name)] for kind, name in wanted]
        faults = [
            self._fault(kind, name, several)
            for (kind, name), several in zip(wanted, found, strict=True)
            if len(several) != 1
        ]
        if not faults:
            return [component for (component,) in found]
        fixes = {fix for _, fix in faults}
        missing = [name for (_, name), several in zip(wanted, found, strict=True) if not several]
        raise PluginError(
            "; ".join(what for what, _ in faults) + self._away(missing),
            fix=fixes.pop() if len(fixes) == 1 else "install what is missing, or see: mlxlora components",
        )

    def _fault(self, kind: str, name: str, found: Sequence[Component]) -> tuple[str, str]:
        """What is wrong with a name that stands for no component or for several, and what to do."""
        if found:
            givers = some(f"{c.plugin} as {c.id}" for c in found)
            return f"{kind} '{name}' is given by {givers}", "write " + " or ".join(c.id for c in found)
        known = sorted({component.spec.name for component in self.of(kind)})
        bare = name.rpartition(":")[2]
        return (
            f"no {kind} '{name}' ({nearest(bare, known)}there is {some(known, 20)})",
            f"install the plugin that gives it, or see: mlxlora components {kind}",
        )

    def _away(self, missing: Sequence[str]) -> str:
        """The plugins that may give what is missing and are not there, and why, for a message."""
        owners = [name.rpartition(":")[0] for name in missing]
        away = [
            plugin
            for plugin in self.plugins
            if plugin.status != "active" and any(not owner or plugin.answers_to(owner) for owner in owners)
        ]
        return "".join(
            f"; plugin {p} failed to load: {p.reason}"
            if p.status == "error"
            else f"; plugin {p} is {p.status} ({p.reason})"
            for p in away
        )


def load(select: Iterable[str] = (), environ: Mapping[str, str] | None = None) -> Registry:
    """Find and import the plugins.

    Args:
        select: ``NAME`` makes a plugin required, ``no:NAME`` leaves it out and
            ``./file.py`` adds a file; as given with ``-P``.
        environ: ``MLXLORA_PLUGINS`` in it is the list of plugins allowed beside
            the built-in ones; unset allows all, empty none. ``os.environ`` by default.

    Raises:
        UsageError: a name after ``-P`` that no plugin has, or that is both
            required and left out.
        PluginError: a plugin named with ``-P`` that cannot be loaded.
    """
    environ = os.environ if environ is None else environ
    wanted, banned, files = _selection(select)
    found = sorted(_discover(), key=lambda f: (f[0].origin != "built-in", _order(f[0])))
    _check_selection([plugin for plugin, _ in found], wanted, banned)
    plugins: list[Plugin] = []
    components: list[Component] = []
    allowed = _allow_list(environ)
    for plugin, get in [*found, *map(_file_plugin, files)]:
        status = _chosen(plugin, wanted, banned, allowed)
        if status:
            plugins.append(replace(plugin, status=status[0], reason=status[1]))
            continue
        plugin, gained = _load_one(plugin, get)
        plugins.append(plugin)
        components += gained
        if plugin.status == "error" and (
            plugin.origin == "file" or any(plugin.answers_to(name) for name in wanted)
        ):
            what = f"plugin {plugin} failed to load: {plugin.reason}"
            raise PluginError(what, where=plugin.value) from plugin.fault
    return Registry(plugins, components)


def start_runtimes(registry: Registry) -> list[specs.RuntimeNote]:
    """Start every runtime, once a process, before MLX computes; return what they have to say.

    A runtime that raises is a warning and leaves the others alone.
    """
    notes = []
    for component in registry.of("runtime"):
        try:
            note = component.spec.start()
            if note is not None and not isinstance(note, specs.RuntimeNote):
                raise PluginError(f"start gives {type(note).__name__}, wanted RuntimeNote or None")
        except (KeyboardInterrupt, Interrupted):
            raise
        except BaseException as fault:
            note = specs.RuntimeNote(f"runtime {component.id} failed: {_reason(fault)}", warning=True)
        if note is not None:
            if note.set_threads is not None:
                use_for_products(note.set_threads)
            if note.exp is not None:
                from mlxlora_core.fast import use_exponential  # inside: it needs MLX, which listing does not

                use_exponential(note.exp)
            notes.append(replace(note, text=one_line(note.text)))
    return notes


# --- phase one: metadata ------------------------------------------------------


def _discover() -> list[tuple[Plugin, Callable[[], Any]]]:
    """The entry points of the group, each distribution's once, and how to import each."""
    seen = set()
    found = []
    for distribution, entry, value, get in _entries():
        name, version = _told(distribution, "Name") or "unknown", _told(distribution, "Version")
        if (_normal(name), entry, value) in seen:
            continue
        seen.add((_normal(name), entry, value))
        origin = "built-in" if _normal(name) == DISTRIBUTION else "installed"
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
        name = _normal(_told(distribution, "Name"))
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
        reason = _reason(fault)

    def refuse() -> None:
        raise PluginError(f"its entry_points.txt cannot be read: {reason}")

    try:
        ours = f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or "")
    except Exception:
        ours = False
    return [(distribution, _told(distribution, "Name"), "entry_points.txt", refuse)] if ours else []


def _told(distribution: importlib.metadata.Distribution | None, name: str) -> str:
    """A field of a distribution's metadata, or nothing where it is damaged."""
    try:
        if distribution is None or name not in distribution.metadata:
            return ""
        return str(distribution.metadata[name])
    except Exception:
        return ""


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


def _check_selection(found: Sequence[Plugin], wanted: Sequence[str], banned: Sequence[str]) -> None:
    """Refuse names that no plugin has, and plugins that are required and left out at once."""
    names = [plugin.name for plugin in found]
    for name in (*wanted, *banned):
        if not any(plugin.answers_to(name) for plugin in found):
            raise UsageError(
                f"-P names no plugin: '{name}' ({nearest(name, names)}there is {some(names, 30)})",
                fix="see: mlxlora plugins",
            )
    for name in wanted:
        if all(any(p.answers_to(no) for no in banned) for p in found if p.answers_to(name)):
            raise UsageError(f"-P {name}: it is left out by -P no: as well", fix="give one of them")


def _chosen(
    plugin: Plugin, wanted: Sequence[str], banned: Sequence[str], allowed: set[str] | None
) -> tuple[Status, str] | None:
    """Why ``plugin`` is not to be imported, or None when it is."""
    ban = next((name for name in banned if plugin.answers_to(name)), None)
    if ban is not None:
        # The distribution of the built-in plugins names all of them: -P no:mlxlora.
        return "disabled", f"-P no:{ban}"
    if plugin.origin != "installed" or allowed is None:
        return None
    if any(plugin.answers_to(name) for name in wanted):
        return None
    if allowed & {_normal(plugin.name), _normal(plugin.distribution)}:
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
        with redirect_stdout(sys.stderr):
            collected = list(_collect(get()))
    except (KeyboardInterrupt, Interrupted):
        raise
    except BaseException as fault:
        return replace(plugin, status="error", reason=_reason(fault), fault=fault), []
    plugin = replace(plugin, components=tuple((kind, spec.name) for kind, spec in collected))
    return plugin, [Component(kind, spec, plugin) for kind, spec in collected]


def _import_file(path: Path) -> ModuleType:
    """The module in a file that was named with -P."""
    if not path.is_file():
        raise PluginError(f"no such file: {path}")
    # Two files of one name are two modules.
    unique = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"mlxlora_file_{path.stem}_{unique}", path)
    if spec is None or spec.loader is None:
        raise PluginError(f"not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _collect(module: Any) -> Iterable[tuple[str, specs.Spec]]:
    """The checked specs of one plugin, kind by kind."""
    version = getattr(module, "mlxlora_api", hookspecs.API_VERSION)
    if version != hookspecs.API_VERSION:
        raise PluginError(f"it needs plugin API {version}, this is {hookspecs.API_VERSION}")
    by_name = _hooks(module)
    for kind, (hook, wanted) in KINDS.items():
        names: set[str] = set()
        for function in by_name.get(hook, ()):
            for spec in _specs(hook, function()):
                _check(spec, hook, wanted)
                if spec.name in names:
                    raise PluginError(f"{hook} gives '{spec.name}' twice")
                names.add(spec.name)
                yield kind, spec


def _hooks(module: Any) -> dict[str, list[Callable[[], Any]]]:
    """hook -> its implementations in ``module``; what is no hook, or is not marked as one, is refused."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(module, "plugin")
    known = sorted(hook for hook, _ in KINDS.values())
    by_name: dict[str, list[Callable[[], Any]]] = {}
    for caller in manager.get_hookcallers(module) or ():
        implementations = [i for i in caller.get_hookimpls() if i.plugin is module]
        by_name[caller.name] = [implementation.function for implementation in implementations]
        # An optional hook is one that only some versions of mlxlora have.
        if caller.name not in known and not all(i.optionalhook for i in implementations):
            raise PluginError(
                f"unknown hook '{caller.name}' ({nearest(caller.name, known)}there is {some(known)})"
            )
    unmarked = [name for name in known if name not in by_name and callable(getattr(module, name, None))]
    if unmarked:
        raise PluginError(f"{some(unmarked)} lacks @hookimpl")
    if not by_name:
        raise PluginError("it implements no hook of mlxlora")
    return by_name


def _specs(hook: str, given: Any) -> list[Any]:
    if isinstance(given, specs.Spec):
        return [given]
    if given is None or isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise PluginError(f"{hook} gives {type(given).__name__}, wanted an iterable of specs")
    return list(given)


def _check(spec: Any, hook: str, wanted: type[specs.Spec]) -> None:
    """Refuse a spec that would only fail later, when it is used."""
    if not isinstance(spec, wanted):
        raise PluginError(f"{hook} gives {type(spec).__name__}, wanted {wanted.__name__}")
    if not isinstance(spec.name, str) or not _NAME.fullmatch(spec.name) or spec.name == "none":
        raise PluginError(f"{hook}: name {spec.name!r} does not match {_NAME.pattern}, or is 'none'")
    for member in fields(wanted):
        fault = _field_fault(str(member.type), getattr(spec, member.name))
        if fault:
            raise PluginError(f"{hook}: {member.name} of '{spec.name}' {fault}")
    base: Any = wanted.options
    if base is not NoOptions and not issubclass(spec.options, base):
        raise PluginError(f"{hook}: options of '{spec.name}' must inherit {base.__name__}")
    taken = sorted(_RESERVED & {option.name for option in explain(spec.options)})
    if taken:
        raise PluginError(f"{hook}: '{spec.name}' cannot have an option '{taken[0]}', recipes use that word")


def _field_fault(annotation: str, value: Any) -> str:
    """What is wrong with the value of a spec's field, or nothing."""
    if annotation.startswith("type["):
        try:
            return check_declaration(value)
        except Exception as fault:
            return f"cannot be used: {_reason(fault)}"
    if annotation.startswith("Callable"):
        return _call_fault(annotation, value)
    words, good = _FIELDS[annotation]
    return "" if good(value) else f"must be {words}, got {value!r}"


def _call_fault(annotation: str, function: Any) -> str:
    """Why ``function`` cannot be called as its ``Callable[[...], ...]`` annotation says, or nothing."""
    if not callable(function):
        return f"must be a function, got {function!r}"
    call: Any = ast.parse(annotation, mode="eval").body
    arguments = call.slice.elts[0].elts
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions tell nothing
        return ""
    try:
        signature.bind(*arguments)
    except TypeError:
        wanted = ", ".join(ast.unparse(argument) for argument in arguments)
        return f"takes {signature}, wanted ({wanted})"
    return ""


def _owner(component: Component, among: Sequence[Component]) -> str:
    """The shortest owner that no other component of ``among`` with the same kind and name answers to."""
    others = [
        c.plugin
        for c in among
        if c is not component and (c.kind, c.spec.name) == (component.kind, component.spec.name)
    ]
    owners = component.plugin.owners
    return next((o for o in owners if not any(plugin.answers_to(o) for plugin in others)), owners[-1])


def _reason(fault: BaseException) -> str:
    """What an exception says, on one line; even one that fails when it is asked."""
    if isinstance(fault, SystemExit):
        return one_line(f"it called sys.exit({fault.code!r})")
    try:
        text = str(fault)
    except Exception:
        text = "(its message cannot be shown)"
    if not isinstance(fault, PluginError):
        text = f"{type(fault).__name__}: {text}"
    return one_line(" ".join(text.split()))


def _order(plugin: Plugin) -> tuple[str, str, str]:
    return plugin.distribution, plugin.name, plugin.value


def _normal(name: str) -> str:
    """A distribution or plugin name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
