"""Mode ``import``: the docstrings of live objects. Runs in a child process only.

What a package does when it is touched is its own affair. Everything here that
runs its code catches ``BaseException``, and what no handler can catch ends the
process, whose parent starts another that keeps out of that place. Objects are
looked at through ``type``, past whatever they answer for themselves.
"""

from __future__ import annotations

import collections
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from types import (
    BuiltinMethodType,
    ClassMethodDescriptorType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

from mlxlora_docstrings.findings import Findings
from mlxlora_docstrings.graph import (
    NO_DOCSTRING,
    PARTS_LIMIT,
    Child,
    Names,
    is_public,
    is_public_path,
    is_read,
    shortest_paths,
)
from mlxlora_docstrings.places import namespaces_in

_names_of_class: Callable[[Any], Mapping[Any, Any]] = vars(type)["__dict__"].__get__
_names_of_module: Callable[[Any], Mapping[Any, Any]] = vars(ModuleType)["__dict__"].__get__
_bases: Callable[[Any], tuple[type, ...]] = vars(type)["__mro__"].__get__

#: Methods in C, which state no module.
_METHODS = (BuiltinMethodType, MethodDescriptorType, ClassMethodDescriptorType, WrapperDescriptorType)

#: Members of classes in C.
_COMPILED = (MethodDescriptorType, ClassMethodDescriptorType, GetSetDescriptorType, MemberDescriptorType)

#: Where names are kept, if they are kept in something.
_TABLES = (list, tuple, set, frozenset, dict)

#: A field of a named tuple: its docstring tells its number and no more.
_TUPLE_FIELD = type(vars(collections.namedtuple("Pair", "left right"))["left"])


class _Value(NamedTuple):
    """A name in ``__all__`` for what cannot have a docstring."""

    name: str
    id: int
    kind: str


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
        self.imported: set[str] = set()
        self._lazy: dict[int, dict[str, Any]] = {}  # by the id of their module
        self._declared: dict[int, set[str]] = {}
        self._promised: set[int] = set()  # ids of what a module declares
        self._all_names = Names()

    def import_module(self, name: str) -> None:
        """Import a module and those below it."""
        if name in self.skip or name.count(".") >= PARTS_LIMIT:
            return
        self.findings.at(name)
        try:
            module = importlib.import_module(name)
            if not _is_a(module, ModuleType):
                raise TypeError(f"it is no module but of type {type(module).__name__}")
            self.imported.add(name)
            folders = _folders(module)
            below = _below(module, folders)
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
            for _, value in _public(self._names(name, module))
            if _is_a(value, type)
        }
        for name, module in modules:
            if name in self.imported and is_public_path(name) and any(_kinds(module)):
                kind = type(module).__qualname__
                self.findings.skip(f"{name}.*", f"a {kind} stands in its place; mode=static reads its source")
        for path, thing in shortest_paths(modules, self._children, _identity):
            # A private module is a place to look in and nothing to ask about.
            if is_public(path.rpartition(".")[2]):
                self._tell(path, thing)
        for source, reason in self._all_names.others():
            self.findings.skip(source, reason)

    def _tell(self, path: str, thing: Any) -> None:
        doc = "" if type(thing) is _Value else _own_doc(thing)
        if doc:
            self.findings.row(path, doc)
            self._all_names.tell(path, id(thing))
        elif is_public_path(path):
            if type(thing) is _Value:
                self.findings.skip(path, f"it is a value, of type {thing.kind}")
            elif id(thing) in self._promised or (_is_a(thing, ModuleType) and any(_kinds(thing))):
                self.findings.skip(path, NO_DOCSTRING)
            elif _is_a(thing, FunctionType) and "<locals>" in str(thing.__qualname__):
                self.findings.skip(path, f"it is a wrapper without a docstring, made by {thing.__qualname__}")

    def _children(self, path: str, thing: Any) -> Iterator[Child[Any]]:
        is_module = _is_a(thing, ModuleType)
        if path not in self.skip and (is_module or _is_a(thing, type)):
            self.findings.at(path)
            yield from self._in_module(path, thing) if is_module else self._in_class(path, thing)

    def _names(self, path: str, module: Any) -> Mapping[Any, Any]:
        """The names of a module, with those that it makes when somebody asks for them."""
        there = _names_of_module(module)
        if id(module) not in self._lazy:
            made = self._lazy[id(module)] = {}
            self.findings.at(path)
            declared, guessed = ([], []) if path in self.skip else _offered(module)
            for name in (*declared, *guessed):
                place = f"{path}.{name}"
                if name not in there and place not in self.skip:
                    self.findings.at(place)
                    try:
                        made[name] = getattr(module, name)
                    except BaseException as fault:
                        if name in declared:
                            self.findings.skip(place, fault)
            self._declared[id(module)] = set(declared)
        return {**there, **self._lazy[id(module)]}

    def _in_module(self, path: str, module: Any) -> Iterator[Child[Any]]:
        names = self._names(path, module)
        listed = self._declared[id(module)]
        home = _name_of(module) + "."
        for name, value in _public(names):
            if _is_a(value, ModuleType):
                # Any other is an import for the module's own use, and no name of it.
                full = _name_of(value)
                if full.startswith(home) or (name in listed and self._is_inside(full)):
                    yield Child(name, False, value)
            elif _has(value, "__call__") and (name in listed or self._is_inside(_module_of(value))):
                if name in listed:
                    self._promised.add(id(value))
                self._all_names.stand(path, name, False, id(value))
                yield Child(name, False, value)
            elif name in listed:
                yield Child(name, False, _Value(name, id(value), type(value).__qualname__))

    def _in_class(self, path: str, cls: Any) -> Iterator[Child[Any]]:
        seen: set[str] = set()
        bare = [name for name, value in _public(_names_of_class(cls)) if _is_bare(cls, value)]
        if bare and is_public_path(path):
            told = f"{len(bare)} of its compiled members have no docstring ({', '.join(bare)})"
            self.findings.skip(f"{path}.*", told)
        for base in _bases(cls):
            if base is not cls and not self._is_inside(_module_of(base)):
                continue
            for name, value in _public(_names_of_class(base)):
                if name in seen:
                    continue
                seen.add(name)
                thing, is_made_here = _member(value)
                member = _has(value, "__get__") or _is_a(value, type)
                if not member or _is_a(value, _TUPLE_FIELD):
                    continue
                if is_made_here or self._is_inside(_module_of(thing)):
                    if base is cls:
                        self._all_names.stand(path, name, True, id(thing))
                    # What comes from a base class without a public name belongs to its subclasses.
                    yield Child(name, base is not cls and id(base) in self.public_classes, thing)

    def _is_inside(self, module: str | None) -> bool:
        """Whether the package made it; what states no module is written in C and came with it."""
        return module is None or module == self.top or module.startswith(self.top + ".")


def _identity(thing: Any) -> Hashable:
    return thing if type(thing) is _Value else id(thing)


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


def _listed(names: Mapping[Any, Any]) -> list[str]:
    """The public names that a module declares as its own."""
    listed: Any = names.get("__all__")
    if type(listed) not in (list, tuple, set, frozenset, dict):
        return []
    return sorted({name for name in listed if type(name) is str and is_public(name)})


def _offered(module: Any) -> tuple[list[str], list[str]]:
    """The public names that a module declares, and those that its ``__getattr__`` seems to know besides.

    Declared is what stands in ``__all__``, and what its ``__dir__`` tells beyond
    what is there. Of a ``__getattr__`` the texts in its code are looked at, and
    the tables that it looks names up in.
    """
    names = _names_of_module(module)
    declared, known = _listed(names), set[str]()
    if "__dir__" in names or any("__dir__" in _names_of_class(kind) for kind in _kinds(module)):
        with suppress(BaseException):
            told = [name for name in list(dir(module)) if type(name) is str and name not in names]
            declared = sorted({*declared, *filter(is_public, told)})
    for inner in names.values():  # a module in the place of another of its name, which it asks
        if _is_a(inner, ModuleType) and inner is not module and _name_of(inner) == _name_of(module):
            known.update(_names_of_module(inner).keys() - names.keys())
    function = names.get("__getattr__")
    known |= _texts(function) if _is_a(function, FunctionType) else set()
    return declared, sorted(name for name in known if is_public(name) and name not in declared)


def _kinds(module: Any) -> Iterator[type]:
    """The classes of a module of another type than usual."""
    return (kind for kind in _bases(type(module)) if kind not in (ModuleType, object))


def _texts(function: Any) -> set[str]:
    """The texts in the code of a function, and in the tables that it looks at."""
    code = function.__code__
    tables = [code.co_consts, *(const for const in code.co_consts if type(const) in _TABLES)]
    tables += [function.__globals__.get(name) for name in code.co_names]
    with suppress(ValueError):  # a cell that is empty
        tables += [cell.cell_contents for cell in function.__closure__ or ()]
    tables = [table for table in tables if type(table) in _TABLES]
    tables += [inner for table in tables if type(table) is dict for inner in list(table.values())]
    return {text for table in tables if type(table) in _TABLES for text in list(table) if type(text) is str}


def _member(value: Any) -> tuple[Any, bool]:
    """What of a member of a class holds its docstring, and whether it can only be the class's own.

    A descriptor is made in the body of its class, though the ``__module__`` that
    shows through it is that of its type.
    """
    if _is_a(value, staticmethod) or _is_a(value, classmethod):
        return _member(value.__func__)[0], False
    if not _has(value, "__get__") or _is_a(value, type) or _is_a(value, FunctionType):
        return value, False
    try:
        if "__module__" in object.__getattribute__(value, "__dict__"):
            return value, False
    except AttributeError:
        return value, False  # of a type in C; of these none states another module than its own
    if _own_doc(value):
        return value, True
    if _is_a(value, functools.singledispatchmethod):
        return value.func, True
    return object.__getattribute__(value, "__dict__").get("__wrapped__", value), True


def _is_bare(cls: Any, value: Any) -> bool:
    """Whether a member of a class is compiled and has no docstring, though its stub may."""
    if _is_a(value, property):
        is_compiled = value.fget is not None and not _is_a(value.fget, FunctionType)
    else:
        is_compiled = type(value) in _COMPILED and "__slots__" not in _names_of_class(cls)
    return is_compiled and not _own_doc(value)


def _folders(module: Any) -> Any:
    """Where the modules below one lie; another module that stands in its place may have to be asked."""
    names = _names_of_module(module)
    if "__path__" not in names and any(_kinds(module)):
        with suppress(BaseException):
            return module.__path__
    return names.get("__path__")


def _below(module: Any, folders: Any) -> list[str]:
    """The modules in these folders of one; what no ``__init__`` makes one is passed over in a package."""
    if folders is None:
        return []
    found = {info.name for info in pkgutil.iter_modules(folders)}
    if _names_of_module(module).get("__file__") is None:
        found |= namespaces_in(folders)
    return sorted(found)


def _name_of(module: Any) -> str:
    """The full name that a module states, ``?`` when it states nonsense."""
    name = _names_of_module(module).get("__name__")
    return name if type(name) is str else "?"


def _module_of(thing: Any) -> str | None:
    """The module that a thing states, or the type that it is a method of; ``?`` when that is nonsense."""
    try:
        module = getattr(thing, "__module__", None)
        if module is None and type(thing) in _METHODS:
            owner = getattr(thing, "__objclass__", None) or thing.__self__
            module = owner.__module__ if _is_a(owner, type) else module
        elif module is None and type(thing).__module__ != "builtins":
            module = type(thing).__module__
    except BaseException:
        return "?"
    return module if module is None or type(module) is str else "?"


def _is_a(thing: object, kind: type) -> bool:
    """``isinstance`` that no proxy answers for itself."""
    return any(base is kind for base in _bases(type(thing)))


def _has(thing: object, special: str) -> bool:
    """Whether the type of ``thing`` has a special method."""
    return any(special in _names_of_class(base) for base in _bases(type(thing)))
