"""Names that a module has only when somebody asks for them, told from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from mlxlora_docstrings.graph import is_public
from mlxlora_docstrings.things import Running, strings_in

Origins = dict[str, tuple[str, str]]  # name -> (module, name in it)


def attached(call: ast.Call, target: ast.Tuple, body: Running) -> bool:
    """Whether a call is one of ``lazy_loader``; if so, its names become those of the module.

    ``__getattr__, __dir__, __all__ = attach(__name__, submodules, submod_attrs)``
    tells them itself, ``attach_stub(__name__, __file__)`` in a stub beside the source.
    """
    kind = ast.unparse(call.func).rpartition(".")[2]
    if kind not in ("attach", "attach_stub"):
        return False
    module = body.module
    if kind == "attach":
        given = dict(zip(("package", "submodules", "submod_attrs"), call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        names = _attached(given.get("submodules"), given.get("submod_attrs"), body)
    else:
        names = body.loader.stub_imports(module)
    module.lazy.update(names)
    module.exports = sorted({*(module.exports or []), *names})
    return True


def _attached(submodules: ast.expr | None, attributes: ast.expr | None, body: Running) -> Origins:
    found: Origins = {}
    here = body.module.module
    for name in strings_in(_table(submodules, body)):
        found[name] = (f"{here}.{name}", "")
    table = _table(attributes, body)
    if isinstance(table, ast.Dict):
        for key, value in zip(table.keys, table.values, strict=True):
            for place in strings_in(key and ast.Tuple([key])):
                found |= {name: (f"{here}.{place}", name) for name in strings_in(_table(value, body))}
    return found


def known_to(function: ast.FunctionDef | ast.AsyncFunctionDef, body: Running) -> Origins:
    """The names that a module's ``__getattr__`` seems to know, and where they come from.

    Names are the texts in its code and in the tables that it looks at; modules are
    what it imports, and texts that may be the name of one.
    """
    names: dict[str, list[str]] = {name: [] for name in body.module.exports or ()}
    modules: list[str] = []
    imported: Origins = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.setdefault(node.value, [])
            modules.append(node.value)
        elif isinstance(node, ast.ImportFrom):
            origin = body.origin(node)
            modules += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
            imported |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.asname: (alias.name, "") for alias in node.names if alias.asname}
        elif isinstance(node, ast.Name) and node.id in body.tables:
            for name, places in _entries(body.tables[node.id]):
                names.setdefault(name, []).extend(places)
    found = {name: imported[name] for name in names if name in imported}
    for name, places in names.items():
        if is_public(name) and name not in found:
            origin_of_name = _origin(name, [*places, *modules], body)
            if origin_of_name:
                found[name] = origin_of_name
    return found


def _entries(table: ast.expr) -> Iterator[tuple[str, list[str]]]:
    """The names in a table, each with the texts that stand beside it."""
    if isinstance(table, ast.Dict):
        for key, value in zip(table.keys, table.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, strings_in(value)
            yield from ((name, strings_in(key and ast.Tuple([key]))) for name in strings_in(value))
    else:
        yield from ((name, []) for name in strings_in(table))


def _origin(name: str, places: list[str], body: Running) -> tuple[str, str] | None:
    """The first of ``places`` that names a module which has ``name``."""
    for place in dict.fromkeys(places):
        path, _, attribute = place.partition(":")
        for module in _modules(path, body):
            if body.loader.has(module, attribute or name):
                return module, attribute or name
    module = f"{body.module.module}.{name}"
    return (module, "") if body.loader.has(module, "") else None


def _modules(path: str, body: Running) -> Iterator[str]:
    """The full names that a text may stand for as the name of a module."""
    parts = path.lstrip(".")
    if not parts or not all(map(str.isidentifier, parts.split("."))):
        return
    level = len(path) - len(parts)
    if level:
        yield body.origin(ast.ImportFrom(parts, [], level))
    elif body.loader.is_inside(parts):
        yield parts
    if not level:
        yield f"{body.module.module}.{parts}"


def _table(node: ast.expr | None, body: Running) -> ast.expr | None:
    """A literal, or the one that a name stands for."""
    return body.tables.get(node.id) if isinstance(node, ast.Name) else node
