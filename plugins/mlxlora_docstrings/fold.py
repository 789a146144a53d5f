"""Texts and tables that a source puts together out of literals, told without running it.

Expressions over texts, numbers and tables are computed here, with the methods
and functions of the tables below and no others.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlxlora_docstrings.things import Running, Thing

TEXT_BYTES = 1 << 20  # of a text that is put together
_ITEMS = 1 << 16  # of a table

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dedent": textwrap.dedent,
    "cleandoc": inspect.cleandoc,
    "getdoc": inspect.cleandoc,
    "compile": re.compile,
    "len": len,
}
_OF_TEXT = """
    endswith format join lower lstrip partition removeprefix removesuffix replace rpartition rstrip split
    splitlines startswith strip title upper
"""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_OF_TEXT.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    re.Pattern: frozenset({"split", "sub"}),
}
_COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.Gt: operator.gt,
    ast.In: lambda item, table: item in table,
    ast.NotIn: lambda item, table: item not in table,
}
_FAULTS = (ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError, re.error)


class Unknown(Exception):
    """What an expression gives is told only by running it."""


def text_of(node: ast.expr | None, body: Running) -> str | None:
    """The text that an expression gives, or None when only running it tells."""
    try:
        value = folded(node, body)
    except Unknown:
        return None
    return value if isinstance(value, str) else None


def folded(node: ast.expr | None, body: Running) -> Any:
    """What an expression over literals gives.

    Raises:
        Unknown: only running it tells.
    """
    try:
        return _Folding(body, {})(node)
    except _FAULTS as fault:
        raise Unknown from fault


class _Folding:
    """Computes expressions where some names are those of a comprehension."""

    def __init__(self, body: Running, names: Mapping[str, Any]) -> None:
        self.body, self.names = body, names

    def __call__(self, node: ast.expr | None) -> Any:
        method = getattr(self, f"_{type(node).__name__}", None)
        if method is None:
            raise Unknown
        value = method(node)
        size = len(value) if isinstance(value, str | list | dict | set | tuple) else 0
        if size >= (TEXT_BYTES if isinstance(value, str) else _ITEMS):
            raise Unknown
        return value

    def _Constant(self, node: ast.Constant) -> Any:
        return node.value

    def _Name(self, node: ast.Name | ast.Attribute) -> Any:
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id]
        return self.body.known(node)

    _Attribute = _Name

    def _JoinedStr(self, node: ast.JoinedStr) -> str:
        return "".join(str(self(piece)) for piece in node.values)

    def _FormattedValue(self, node: ast.FormattedValue) -> str:
        if node.conversion != -1 or node.format_spec is not None:
            raise Unknown
        return str(self(node.value))

    def _BinOp(self, node: ast.BinOp) -> Any:
        if isinstance(node.op, ast.Mod) and isinstance(form := self(node.left), str):
            return form % self(node.right)
        if not isinstance(node.op, ast.Add):
            raise Unknown
        terms: list[ast.expr] = []  # however many, without a call for each
        left: ast.expr = node
        while isinstance(left, ast.BinOp) and isinstance(left.op, ast.Add):
            terms.append(left.right)
            left = left.left
        values = [self(term) for term in (left, *reversed(terms))]
        if isinstance(values[0], list):
            return [item for value in values for item in value]
        return "".join(values)

    def _Compare(self, node: ast.Compare) -> bool:
        return _COMPARED[type(node.ops[0])](self(node.left), self(*node.comparators))

    def _IfExp(self, node: ast.IfExp) -> Any:
        return self(node.body if self(node.test) else node.orelse)

    def _Subscript(self, node: ast.Subscript) -> Any:
        return self(node.value)[self(node.slice)]

    def _List(self, node: ast.List | ast.Tuple | ast.Set) -> list[Any]:
        return [self(item) for item in node.elts]

    def _Tuple(self, node: ast.Tuple | ast.Set) -> tuple[Any, ...]:
        return tuple(self._List(node))

    _Set = _Tuple

    def _Dict(self, node: ast.Dict) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            made |= {self(key): self(value)} if key else self(value)
        return made

    def _ListComp(self, node: ast.ListComp | ast.GeneratorExp) -> list[Any]:
        return [inner(node.elt) for inner in self._rounds(node.generators)]

    _GeneratorExp = _ListComp

    def _DictComp(self, node: ast.DictComp) -> dict[Any, Any]:
        return {inner(node.key): inner(node.value) for inner in self._rounds(node.generators)}

    def _rounds(self, loops: list[ast.comprehension]) -> Iterator[_Folding]:
        for item in self(loops[0].iter):
            inner = _Folding(self.body, {**self.names, **_bound(loops[0].target, item)})
            if all(inner(test) for test in loops[0].ifs):
                yield from inner._rounds(loops[1:]) if loops[1:] else [inner]

    def _Call(self, node: ast.Call) -> Any:
        found = self.body.look_at(node.func)
        if isinstance(found, Thing) and found.apply is not None:
            return found.apply(*self._arguments(node))
        values, named = self._arguments(node)
        function = _FUNCTIONS.get(ast.unparse(node.func).rpartition(".")[2])
        if function is None:
            if not isinstance(node.func, ast.Attribute):
                raise Unknown
            owner = self(node.func.value)
            if node.func.attr not in _METHODS.get(type(owner), frozenset()):
                raise Unknown
            function = getattr(owner, node.func.attr)
        return function(*values, **named)

    def _arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        values: list[Any] = []
        for item in node.args:
            values += self(item.value) if isinstance(item, ast.Starred) else [self(item)]
        named: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self(keyword.value)
            named |= {keyword.arg: value} if keyword.arg else value
        return values, named


def _bound(target: ast.expr, item: Any) -> dict[str, Any]:
    """The names of a comprehension's target for one item."""
    if isinstance(target, ast.Name):
        return {target.id: item}
    if not isinstance(target, ast.Tuple):
        raise Unknown
    return {
        k: v for part, value in zip(target.elts, item, strict=True) for k, v in _bound(part, value).items()
    }
