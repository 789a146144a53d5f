"""Conditions in a source: whether they hold, as far as that can be told without running anything."""

from __future__ import annotations

import ast
import os
import platform
import sys
from collections.abc import Callable

_KNOWN = {
    "sys.platform": sys.platform,
    "platform.system()": platform.system(),
    "os.name": os.name,
    "sys.version_info": tuple(sys.version_info[:3]),
}
_OFF = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def truth(test: ast.expr, known: Callable[[ast.expr], bool | None]) -> bool | None:
    """Whether a condition holds, or None when only running it tells.

    Args:
        test: the condition.
        known: tells it of what is no condition on the platform.
    """
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = truth(test.operand, known)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        parts = [truth(value, known) for value in test.values]
        settled = isinstance(test.op, ast.Or)
        return settled if settled in parts else None if None in parts else not settled
    if isinstance(test, ast.Constant):
        return bool(test.value)
    text = ast.unparse(test)
    if text in _OFF or text.startswith(("os.environ.get(", "os.getenv(")):
        return False  # a child has no variables but those that it needs
    told = _compared(test) if isinstance(test, ast.Compare) and len(test.ops) == 1 else None
    return known(test) if told is None else told


def _compared(test: ast.Compare) -> bool | None:
    if ast.unparse(test.comparators[0]) == "os.environ":
        return isinstance(test.ops[0], ast.NotIn)
    left = ast.unparse(test.left)
    known = "a module" if left == "__name__" else _KNOWN.get(left)
    try:
        value = ast.literal_eval(test.comparators[0])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if type(value) is not type(known):
        return None
    kind = type(test.ops[0])
    if kind is ast.Eq or kind is ast.NotEq:
        return (known == value) == (kind is ast.Eq)
    if isinstance(known, tuple) and isinstance(value, tuple) and kind in (ast.GtE, ast.Gt, ast.Lt, ast.LtE):
        return (known >= value) == (kind in (ast.GtE, ast.Gt))
    return None


def named(test: ast.expr) -> tuple[str, str]:
    """The name and the text of ``name == "text"``, or nothing."""
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq):
        return "", ""
    left, right = test.left, test.comparators[0]
    if isinstance(left, ast.Name) and isinstance(right, ast.Constant) and isinstance(right.value, str):
        return left.id, right.value
    return "", ""
