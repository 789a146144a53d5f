"""In which order statements run, as far as that can be told without running them."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from mlxlora_docstrings.conditions import named, truth
from mlxlora_docstrings.things import IMPORTED, MADE, Thing

ROUNDS_LIMIT = 1000  # of a loop over a literal


class Missing(Exception):
    """An import that fails, where something else is done then."""


class Returned(Exception):
    """What a function gives."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Flow:
    """Goes through the statements of a module or a class; what a statement binds, a subclass tells.

    Args:
        module: the module.
        scope: the module or the class.

    Attributes:
        texts: names that stand for a text.
        tables: names that stand for a literal.
        tries: statements around this one in which an import may fail.
        doubts: conditions around it that cannot be told.
    """

    def __init__(self, module: Thing, scope: Thing) -> None:
        self.module, self.scope = module, scope
        self.texts: dict[str, str] = {"__name__": module.module}
        self.tables: dict[str, ast.expr] = {}
        self.tries = 0
        self.doubts = 0

    def run(self, statements: Iterable[ast.stmt]) -> None:
        """Run statements one after another.

        Raises:
            Missing: an import in a ``try`` fails.
        """
        for statement in statements:
            method = getattr(self, f"_run_{type(statement).__name__}", None)
            if method is not None:
                method(statement)

    def bind(self, name: str, thing: Thing) -> None:
        """Have a name stand for something."""
        self.texts.pop(name, None)
        self.scope.names[name] = thing
        if name == "__doc__" and self.scope is not self.module:
            self.scope.doc = ""  # a property, for the objects of the class

    def holds(self, test: ast.expr) -> bool | None:
        """Whether a condition holds, or None when only running it tells."""
        raise NotImplementedError

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        """``target = value``."""
        raise NotImplementedError

    def _run_If(self, node: ast.If) -> None:
        told = truth(node.test, self.holds)
        self.doubts += told is None
        try:
            if told is not True:
                self.run(node.orelse)
            if told is not False:
                name, text = named(node.test)
                if name:
                    self.texts[name] = text
                self.run(node.body)
                if name:
                    self.texts.pop(name, None)
        finally:
            self.doubts -= told is None

    def _run_Try(self, node: ast.Try) -> None:
        self.tries += bool(node.handlers)
        try:
            self.run(node.body)
            failed = False
        except Missing:
            failed = True
        finally:
            self.tries -= bool(node.handlers)
        if failed and node.handlers:
            self.run(node.handlers[0].body)
        else:
            self.run(node.orelse)
        self.run(node.finalbody)

    _run_TryStar = _run_Try

    def _run_With(self, node: ast.With) -> None:
        self.run(node.body)

    def _run_For(self, node: ast.For) -> None:
        items = self.tables.get(node.iter.id) if isinstance(node.iter, ast.Name) else node.iter
        if isinstance(items, ast.List | ast.Tuple | ast.Set):
            for item in items.elts[:ROUNDS_LIMIT]:
                self.assign(node.target, item)
                self.run(node.body)
        else:
            self.doubts += 1
            for name in ast.walk(node.target):
                if isinstance(name, ast.Name) and self.scope is self.module:
                    self.bind(name.id, Thing(IMPORTED, self.module.module, reason=MADE))
            self.run(node.body)
            self.doubts -= 1

    def _run_While(self, node: ast.While) -> None:
        self.doubts += 1
        self.run(node.body)
        self.doubts -= 1

    def _run_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.scope.names.pop(target.id, None)
