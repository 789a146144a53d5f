"""What an expression in a source gives, if that is something that has a docstring."""

from __future__ import annotations

import ast

from mlxlora_docstrings.declared import add_docstr
from mlxlora_docstrings.fold import text_of
from mlxlora_docstrings.things import (
    CLASS,
    FIELDS,
    FUNCTION,
    IMPORTED,
    MADE,
    MODULE,
    PROPERTY,
    TOGETHER,
    Running,
    Thing,
)


def value_of(node: ast.expr, name: str, body: Running) -> Thing | None:
    """What an expression gives.

    Args:
        node: the expression.
        name: what it is bound to.
        body: where it stands.
    """
    if isinstance(node, ast.Name | ast.Attribute):
        return _named(node, body)
    if not isinstance(node, ast.Call):
        return None
    made_by = ast.unparse(node.func).rpartition(".")[2]
    things = [found for item in node.args if isinstance(found := body.look_at(item), Thing)]
    if made_by in ("staticmethod", "classmethod") and things:
        return things[0]
    if made_by == "property":
        return _property(node, things, body)
    if made_by.endswith("namedtuple"):
        return Thing(CLASS, body.module.module, reason=FIELDS)
    if made_by.endswith("add_docstr") and len(node.args) == 2:
        return add_docstr(node, body)
    if made_by == "getattr" and len(node.args) == 2 and (text := text_of(node.args[1], body)):
        found = _named(ast.Attribute(node.args[0], text), body)
        owner = body.look_at(node.args[0])
        return (
            body.imported(owner, text) if found is None and isinstance(owner, Thing) and owner.more else found
        )
    if body.documents(node):
        return Thing(FUNCTION, body.module.module, reason=TOGETHER)
    maker = body.look_at(node.func)
    if isinstance(maker, Thing) and maker.kind == CLASS and maker.is_module:
        return Thing(IMPORTED, body.module.module, reason=MADE)
    if body.scope is body.module and isinstance(maker, Thing) and maker.kind == CLASS:
        return None  # an object of the class, whatever that does with what it is given
    # What goes through a function and keeps its name was decorated.
    return next((thing for thing in things if thing is body.scope.names.get(name)), None)


def _named(node: ast.Name | ast.Attribute, body: Running) -> Thing | None:
    found = body.look(node)
    if found is None and isinstance(node, ast.Attribute):
        owner = body.look(node.value)
        if isinstance(owner, Thing) and owner.kind == MODULE and owner.is_compiled:
            return body.imported(owner, node.attr)
    return found if isinstance(found, Thing) else None


def _property(call: ast.Call, things: list[Thing], body: Running) -> Thing:
    """``property(get, set, delete, doc)``."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    getter = body.look_at(named["fget"]) if "fget" in named else next(iter(things), None)
    given = [named["doc"]] if "doc" in named else call.args[3:4]
    doc = text_of(given[0], body) if given else getter.doc if isinstance(getter, Thing) else ""
    return Thing(PROPERTY, body.module.module, doc or "", "" if doc is not None else TOGETHER)
