"""What mode ``static`` knows of a module, a class or a function."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

MODULE, CLASS, FUNCTION, PROPERTY = "module", "class", "function", "property"
VALUE = "value"  # something else, or what only running tells
IMPORTED = "imported"  # from a module of the package that does not show it in its source

COMPILED = "its docstring is compiled; mode=import reads it"
DECORATED = "its docstring, if any, is that of what a decorator makes of it; mode=import reads it"
MADE = "it is made when the package runs; mode=import reads it"
GIVEN = "it is given names when the package runs; mode=import reads them"
REPLACED = "it puts something else in its place; mode=import reads that"
FIELDS = "its docstring is made of its fields when the package runs; mode=import reads it"
TOGETHER = "its docstring is put together when the package runs; mode=import reads it"


@dataclass(eq=False)
class Thing:
    """Something that a name stands for.

    Attributes:
        kind: what it is.
        module: the full name of the module that it is made in; of a module, its own.
        doc: its docstring as it stands in the source.
        reason: why its docstring is not known, where it may have one.
        more: why there may be more names in it than are known, if so.
        is_compiled: whether it is known from a stub or not at all.
        is_module: whether it is a class of modules.
        value: the text, the table or the truth value that it is, if that is known.
        documents: whether it is a function that writes docstrings.
        names: what is in a module or a class.
        bases: of a class.
        exports: ``__all__`` of a module, where it has one.
        lazy: name -> (module, name in it) of what a module gets when somebody asks for it.
        apply: gives what a function gives, whose module has a part in documenting what is compiled.
        ask: tells more of ``lazy``, for a module whose ``__getattr__`` is its own.
    """

    kind: str
    module: str
    doc: str = ""
    reason: str = ""
    more: str = ""
    is_compiled: bool = False
    is_module: bool = False
    value: Any = None
    documents: bool = False
    names: dict[str, Thing] = field(default_factory=dict)
    bases: list[Thing] = field(default_factory=list)
    exports: list[str] | None = None
    lazy: dict[str, tuple[str, str]] = field(default_factory=dict)
    apply: Callable[[list[Any], dict[str, Any]], Any] | None = None
    ask: Callable[[], dict[str, tuple[str, str]]] | None = None

    def lineage(self) -> Iterator[Thing]:
        """A class and its bases, those of the first base first."""
        seen: set[int] = set()
        waiting = [self]
        while waiting:
            thing = waiting.pop()
            if id(thing) not in seen:
                seen.add(id(thing))
                yield thing
                waiting.extend(reversed(thing.bases))

    def member(self, name: str) -> Thing | None:
        """What a name stands for in a class or its bases, or in a module."""
        return next((found for thing in self.lineage() if (found := thing.names.get(name))), None)


class Loader(Protocol):
    """What finds and reads modules."""

    def load(self, name: str) -> Thing | None:
        """The module of this full name, or None when the package has none."""
        ...

    def attribute(self, module: Thing, name: str) -> Thing | None:
        """What a name of a module stands for."""
        ...

    def has(self, module: str, name: str) -> bool:
        """Whether there is a module of this name, and ``name`` in it, if that is something."""
        ...

    def stub_imports(self, module: Thing) -> dict[str, tuple[str, str]]:
        """What the stub beside the source of a module imports: name -> (module, name in it)."""
        ...

    def is_there(self, name: str) -> bool:
        """Whether a module of another package is installed."""
        ...

    def is_inside(self, name: str) -> bool:
        """Whether a module is of the package that is read."""
        ...


class Running(Protocol):
    """The body of a module or a class whose statements are followed.

    Attributes:
        loader: for what is imported.
        module: the module.
        scope: the module or the class.
        tables: names that stand for a literal.
        extenders: functions that add the ``__all__`` of what they are given to that of the module.
    """

    loader: Loader
    module: Thing
    scope: Thing
    tables: dict[str, ast.expr]
    extenders: set[str]

    def look(self, node: ast.expr) -> Thing | str | None:
        """What a name or a path of names stands for."""
        ...

    def look_at(self, node: ast.expr) -> Thing | str | None:
        """What an argument stands for."""
        ...

    def known(self, node: ast.Name | ast.Attribute) -> Any:
        """The text or table that a name stands for."""
        ...

    def origin(self, node: ast.ImportFrom) -> str:
        """The full name of the module that is imported from."""
        ...

    def imported(self, source: Thing, name: str) -> Thing:
        """What an import of a name from a module gives."""
        ...

    def documents(self, node: ast.expr) -> bool:
        """Whether what is called is a function of the package that writes docstrings."""
        ...

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        """``target = value``."""
        ...

    def document(self, thing: Thing, text: str | None) -> None:
        """Give something a docstring; None is one that only running tells."""
        ...


def strings_in(node: ast.AST | None) -> list[str]:
    """The texts in the list, set, tuple or keys of a literal, in their order."""
    if isinstance(node, ast.Dict):
        return [text for key in node.keys if key for text in strings_in(key)]
    if isinstance(node, ast.List | ast.Set | ast.Tuple):
        return [text for item in node.elts for text in strings_in(item)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
