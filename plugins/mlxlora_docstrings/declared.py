"""What a source declares: the names in ``__all__``, and docstrings that are given by a call."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress

from mlxlora_docstrings.fold import Unknown, folded, text_of
from mlxlora_docstrings.things import (
    CLASS,
    FUNCTION,
    GIVEN,
    IMPORTED,
    MADE,
    MODULE,
    REPLACED,
    Running,
    Thing,
    strings_in,
)


def exported(node: ast.expr, body: Running) -> Iterator[str]:
    """The names in an expression that ``__all__`` is made of, as far as they can be told."""
    if isinstance(node, ast.BinOp):
        yield from exported(node.left, body)
        yield from exported(node.right, body)
    elif isinstance(node, ast.List | ast.Tuple | ast.Set):
        for item in node.elts:
            yield from exported(item.value, body) if isinstance(item, ast.Starred) else strings_in(item)
    elif isinstance(node, ast.Attribute) and node.attr == "__all__":
        owner = body.look(node.value)
        yield from (owner.exports or []) if isinstance(owner, Thing) else []
    elif isinstance(node, ast.Name) and node.id in body.tables:
        yield from strings_in(body.tables[node.id])
    elif isinstance(node, ast.Name) and node.id == "__all__":
        yield from body.module.exports or []
    elif isinstance(node, ast.Call) and len(node.args) == 1:
        yield from exported(node.args[0], body)


def called(call: ast.Call, body: Running) -> None:
    """Take in what a statement that is a call declares."""
    made_by = ast.unparse(call.func)
    if made_by.startswith("__all__.") and len(call.args) == 1:
        names = list(exported(call.args[0], body)) or strings_in(call.args[0])
        old = body.module.exports or []
        removed = set(names) if made_by.endswith("remove") else set()
        body.module.exports = [*(name for name in old if name not in removed)]
        body.module.exports += [] if removed else names
    elif made_by == "delattr" and len(call.args) == 2:
        if ast.unparse(call.args[0]) == "sys.modules[__name__]":
            body.module.names.pop(text_of(call.args[1], body) or "", None)
    elif made_by in body.extenders:
        owners = [owner for item in call.args if isinstance(owner := body.look_at(item), Thing)]
        names = [name for owner in owners for name in owner.exports or ()]
        body.module.exports = [*(body.module.exports or []), *names]
    elif made_by == "setattr" and len(call.args) == 3:
        _set(call, body)
    elif made_by.endswith("add_docstr") and len(call.args) == 2:
        add_docstr(call, body)
    elif made_by.endswith("add_newdoc") and len(call.args) >= 3:
        _add_newdoc(call, body)
    else:
        with suppress(Unknown):
            folded(call, body)  # a function of the source that declares something


def _set(call: ast.Call, body: Running) -> None:
    """``setattr(something, name, value)``."""
    owner, name = body.look_at(call.args[0]), text_of(call.args[1], body)
    if isinstance(owner, Thing) and owner.kind in (MODULE, CLASS):
        if name is None:
            owner.more = owner.more or GIVEN
        else:
            body.assign(ast.Attribute(call.args[0], name), call.args[2])


def add_docstr(call: ast.Call, body: Running) -> Thing | None:
    """``add_docstr(something, text)``, by which torch documents what is compiled."""
    target, text = call.args[0], text_of(call.args[1], body)
    if isinstance(target, ast.Call) and ast.unparse(target.func) == "getattr" and len(target.args) == 2:
        target = ast.Attribute(target.args[0], text_of(target.args[1], body) or "")
    if not isinstance(target, ast.Name | ast.Attribute):
        return None
    found = body.look(target)
    if not isinstance(found, Thing):
        owner = body.look(target.value) if isinstance(target, ast.Attribute) else None
        if isinstance(owner, Thing) and owner.more == REPLACED:
            return Thing(IMPORTED, body.module.module, reason=MADE)
        found = Thing(FUNCTION, body.module.module)
        if isinstance(owner, Thing) and isinstance(target, ast.Attribute):
            owner.names[target.attr] = found
    if text is not None or not found.doc:
        body.document(found, text)
    return found


def _add_newdoc(call: ast.Call, body: Running) -> None:
    """``add_newdoc(module, name, text)`` or ``(attribute, text)``, by which numpy does it."""
    place, name = (text_of(item, body) for item in call.args[:2])
    if not place or not name or not body.loader.is_inside(place):
        return
    owner = body.loader.load(place)
    if owner is None:
        return
    thing = body.loader.attribute(owner, name) or owner.names.setdefault(name, Thing(FUNCTION, place))
    given = call.args[2]
    for item in given.elts if isinstance(given, ast.List) else [given]:
        if isinstance(item, ast.Tuple) and len(item.elts) == 2:
            attribute, text = (text_of(part, body) for part in item.elts)
            thing.kind = CLASS
            if attribute:
                member = thing.names.setdefault(attribute, Thing(FUNCTION, place))
                body.document(member, _shown(text))
        else:
            body.document(thing, text_of(item, body))


def _shown(text: str | None) -> str | None:
    """The docstring that a compiled method shows: the signature in front of it is taken away."""
    return re.sub(r"\A\w+\(.*?\)\n--\n\n", "", inspect.cleandoc(text), flags=re.DOTALL) if text else text


def extends_all(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function seems to add the ``__all__`` of a module that it is given to that of its own."""
    if len(function.args.args) != 1:
        return False
    nodes = list(ast.walk(function))
    ours = any(isinstance(node, ast.Name) and node.id == "__all__" for node in nodes)
    return ours and any(isinstance(node, ast.Attribute) and node.attr == "__all__" for node in nodes)
