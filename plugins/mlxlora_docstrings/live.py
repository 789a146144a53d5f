"""Mode ``import``: the docstrings of live objects. Runs in a child process only.

What a package does when it is touched is its own affair. Everything here that
runs its code catches ``BaseException``, and what no handler can catch ends the
process, whose parent starts another that keeps out of that place. Objects are
looked at through ``type``, past whatever they answer for themselves.
"""

from __future__ import annotations

import collections
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from mlxlora_docstrings.findings import Findings
from mlxlora_docstrings.graph import PARTS_LIMIT, Child, is_public, is_public_path, is_read, shortest_paths

_names_of_class: Callable[[Any], Mapping[Any, Any]] = vars(type)["__dict__"].__get__
_names_of_module: Callable[[Any], Mapping[Any, Any]] = vars(ModuleType)["__dict__"].__get__
_bases: Callable[[Any], tuple[type, ...]] = vars(type)["__mro__"].__get__

#: A field of a named tuple: its docstring tells its number and no more.
_TUPLE_FIELD = type(vars(collections.namedtuple("Pair", "left right"))["left"])


def read(package: str, skip: frozenset[str], findings: Findings) -> None:
    """Import ``package`` with its submodules and report every documented object.

    Args:
        package: what import takes.
        skip: modules and classes that ended or hung an earlier process.
        findings: takes the rows and the faults.
    """
    reader = _Reader(package, skip, findings)
    reader.import_module(package)
    reader.report()


class _Reader:
    """Reads one package."""

    def __init__(self, package: str, skip: frozenset[str], findings: Findings) -> None:
        self.package, self.skip, self.findings = package, skip, findings
        self.top = package.partition(".")[0]
        self.public_classes: set[int] = set()

    def import_module(self, name: str) -> None:
        """Import a module and those below it."""
        if name in self.skip or name.count(".") >= PARTS_LIMIT:
            return
        self.findings.at(name)
        try:
            module = importlib.import_module(name)
            if not _is_a(module, ModuleType):
                raise TypeError(f"it is no module but of type {type(module).__name__}")
            folders = _names_of_module(module).get("__path__")
            below = () if folders is None else sorted({info.name for info in pkgutil.iter_modules(folders)})
        except BaseException as fault:
            self.findings.skip(name, fault)
            return
        for found in below:
            if found.isidentifier() and is_read(f"{name}.{found}", self.package):  # others are scripts
                self.import_module(f"{name}.{found}")

    def report(self) -> None:
        """Report every documented object under its best path."""
        modules = [
            (name, module)
            for name, module in sorted(item for item in sys.modules.items() if type(item[0]) is str)
            if (name == self.package or name.startswith(self.package + "."))
            and is_read(name, self.package)
            and _is_a(module, ModuleType)
        ]
        self.public_classes = {
            id(value)
            for name, module in modules
            if is_public_path(name)
            for _, value in _public(_names_of_module(module))
            if _is_a(value, type)
        }
        for path, thing in shortest_paths(modules, self._children, id):
            # A private module is a place to look in and nothing to ask about.
            if is_public(path.rpartition(".")[2]):
                doc = _own_doc(thing)
                if doc:
                    self.findings.row(path, doc)

    def _children(self, path: str, thing: Any) -> Iterator[Child[Any]]:
        is_module = _is_a(thing, ModuleType)
        if path not in self.skip and (is_module or _is_a(thing, type)):
            self.findings.at(path)
            yield from self._in_module(thing) if is_module else self._in_class(thing)

    def _in_module(self, module: Any) -> Iterator[Child[Any]]:
        names = _names_of_module(module)
        listed = _listed(names)
        home = _name_of(module) + "."
        for name, value in _public(names):
            if _is_a(value, ModuleType):
                # Any other is an import for the module's own use, and no name of it.
                full = _name_of(value)
                if full.startswith(home) or (name in listed and self._is_inside(full)):
                    yield Child(name, False, value)
            elif _has(value, "__call__") and (name in listed or self._is_inside(_module_of(value))):
                yield Child(name, False, value)

    def _in_class(self, cls: Any) -> Iterator[Child[Any]]:
        seen: set[str] = set()
        for base in _bases(cls):
            if base is not cls and not self._is_inside(_module_of(base)):
                continue
            for name, value in _public(_names_of_class(base)):
                if name in seen:
                    continue
                seen.add(name)
                if _is_a(value, staticmethod) or _is_a(value, classmethod):
                    value = value.__func__
                member = _has(value, "__get__") or _is_a(value, type)
                if member and not _is_a(value, _TUPLE_FIELD) and self._is_inside(_module_of(value)):
                    # What comes from a base class without a public name belongs to its subclasses.
                    yield Child(name, base is not cls and id(base) in self.public_classes, value)

    def _is_inside(self, module: str | None) -> bool:
        """Whether the package made it; what states no module is written in C and came with it."""
        return module is None or module == self.top or module.startswith(self.top + ".")


def _own_doc(thing: Any) -> str:
    """``inspect.getdoc(thing)`` if that text is the thing's own, or nothing.

    ``getdoc`` climbs to base classes and an instance shows the text of its
    class: hundreds of names would repeat one text that says nothing of them.
    """
    try:
        own = _names_of_class(thing).get("__doc__") if _is_a(thing, type) else thing.__doc__
        doc = inspect.getdoc(thing) if own is not None else None
        if type(doc) is not str:
            return ""
        return doc if _is_a(thing, type) or doc != inspect.getdoc(type(thing)) else ""
    except BaseException:
        return ""


def _public(names: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """The public names of a module or a class, as they are at this moment."""
    return [(name, value) for name, value in list(names.items()) if type(name) is str and is_public(name)]


def _listed(names: Mapping[Any, Any]) -> set[str]:
    """What a module declares as its own."""
    listed: Any = names.get("__all__")
    return {name for name in listed if type(name) is str} if type(listed) in (list, tuple) else set()


def _name_of(module: Any) -> str:
    """The full name that a module states, ``?`` when it states nonsense."""
    name = _names_of_module(module).get("__name__")
    return name if type(name) is str else "?"


def _module_of(thing: Any) -> str | None:
    """The module that a thing states, ``?`` when it states nonsense."""
    try:
        module = thing.__module__
    except AttributeError:
        return None
    except BaseException:
        return "?"
    return module if module is None or type(module) is str else "?"


def _is_a(thing: object, kind: type) -> bool:
    """``isinstance`` that no proxy answers for itself."""
    return any(base is kind for base in _bases(type(thing)))


def _has(thing: object, special: str) -> bool:
    """Whether the type of ``thing`` has a special method."""
    return any(special in _names_of_class(base) for base in _bases(type(thing)))
