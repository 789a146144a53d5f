"""What the statements of a module or a class bind, told without running them.

This follows imports, definitions, aliases, ``__all__`` and docstrings in the
order in which Python would run the statements. A condition that cannot be told
is taken both ways. Whatever else a statement does is passed over.
"""

from __future__ import annotations

import ast
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from typing import Protocol

from mlxlora_docstrings.graph import is_public
from mlxlora_docstrings.lazy import attached, known_to
from mlxlora_docstrings.things import (
    CLASS,
    FUNCTION,
    IMPORTED,
    MODULE,
    PROPERTY,
    VALUE,
    Thing,
    strings_in,
    text_of,
)

COMPILED = "its docstring is compiled; mode=import reads it"
MADE = "it is made when the package runs; mode=import reads it"
FIELDS = "its docstring is made of its fields when the package runs; mode=import reads it"
TOGETHER = "its docstring is put together when the package runs; mode=import reads it"

_KNOWN = {
    "sys.platform": sys.platform,
    "platform.system()": platform.system(),
    "os.name": os.name,
    "sys.version_info": tuple(sys.version_info[:3]),
}
_OFF = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


class Missing(Exception):
    """An import that fails, where something else is done then."""


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


class Body:
    """Runs the body of a module, or of a class in one.

    Args:
        loader: for what is imported.
        module: the module.
        scope: the module or the class.
        is_package: whether relative imports start at the module itself.
        is_stub: whether it is a stub of something that is compiled.
        outer: the body of the module around a class.

    Attributes:
        texts: names that stand for a text.
        tables: names that stand for a literal.
        writes_doc: whether ``__doc__`` stands in the source at all.
    """

    def __init__(
        self,
        loader: Loader,
        module: Thing,
        scope: Thing,
        is_package: bool,
        is_stub: bool,
        outer: Body | None = None,
    ) -> None:
        self.loader, self.module, self.scope = loader, module, scope
        self.is_package, self.is_stub, self.outer = is_package, is_stub, outer
        self.texts: dict[str, str] = {"__name__": module.module}
        self.tables: dict[str, ast.expr] = {}
        self.writes_doc: bool = outer is not None and outer.writes_doc
        self.extenders: set[str] = set()  # functions that add the ``__all__`` of what they are given to ours
        self._tries = 0

    def run(self, statements: Iterable[ast.stmt]) -> None:
        """Run statements one after another.

        Raises:
            Missing: an import in a ``try`` fails.
        """
        for statement in statements:
            method = getattr(self, f"_run_{type(statement).__name__}", None)
            if method is not None:
                method(statement)

    def look(self, node: ast.expr) -> Thing | str | None:
        """What a name or a path of names stands for."""
        if isinstance(node, ast.Name):
            found = self.texts.get(node.id) or self.scope.names.get(node.id)
            return found or (self.outer.look(node) if self.outer else None)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.look(node.value)
        if not isinstance(owner, Thing):
            return None
        if node.attr == "__doc__":
            return owner.doc or None
        if node.attr in ("fget", "func", "__func__", "__wrapped__") and owner.kind in (PROPERTY, FUNCTION):
            return Thing(FUNCTION, owner.module, owner.doc, owner.reason)
        return self.loader.attribute(owner, node.attr) if owner.kind == MODULE else owner.member(node.attr)

    def bind(self, name: str, thing: Thing) -> None:
        """Have a name stand for something."""
        self.texts.pop(name, None)
        self.scope.names[name] = thing

    # --- imports ---

    def _run_Import(self, node: ast.Import) -> None:
        for alias in () if self.is_stub else node.names:
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            if self.loader.is_inside(alias.name):
                thing = self.loader.load(alias.name)
                if thing is None and self._tries:
                    raise Missing
                bound = self.loader.load(name)
            else:
                bound = self._foreign(alias.name, name)
            if bound:
                self.bind(alias.asname or name, bound)

    def _run_ImportFrom(self, node: ast.ImportFrom) -> None:
        origin = self.origin(node)
        inside = self.loader.is_inside(origin)
        if self.is_stub and node.names[0].name != "*":
            # What is compiled imports nothing of this. It is for the stub's own use unless it says "as".
            given = {alias.asname: alias.name for alias in node.names if inside and alias.asname}
            self.module.lazy.update({name: (origin, there) for name, there in given.items()})
            return
        source = self.loader.load(origin) if inside else None
        if inside and source is None and self._tries:
            raise Missing
        for alias in node.names:
            if alias.name == "*":
                for name, thing in self._star(source):
                    self.bind(name, thing)
                if not inside and self.outer is None:
                    self.module.more = f"it takes what {origin} has; mode=import reads it"
                continue
            if source is not None and alias.name in ("__all__", "__doc__"):
                if alias.name == "__all__":
                    self.module.exports = list(source.exports or ())
                else:
                    self._document(self.scope, source.doc)
                continue
            if source is not None:
                thing = self._imported(source, alias.name)
            else:
                thing = self._foreign(origin, f"{origin}.{alias.name}")
            self.bind(alias.asname or alias.name, thing)

    def origin(self, node: ast.ImportFrom) -> str:
        """The full name of the module that is imported from."""
        if not node.level:
            return node.module or ""
        parts = self.module.module.split(".")
        parts = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*parts, *filter(None, [node.module])])

    def _imported(self, source: Thing, name: str) -> Thing:
        found = self.loader.attribute(source, name) or self.loader.load(f"{source.module}.{name}")
        if found is None:
            if self._tries and not source.is_compiled:
                raise Missing
            found = source.names[name] = Thing(IMPORTED, source.module, reason=MADE)
        return found

    def _foreign(self, module: str, name: str) -> Thing:
        if self._tries and not self.loader.is_there(module.partition(".")[0]):
            raise Missing
        return Thing(VALUE, name, reason=f"it is of another package ({module}); mode=import reads it")

    def _star(self, source: Thing | None) -> Iterator[tuple[str, Thing]]:
        if source is None:
            return
        if source.exports is None:
            yield from [(name, thing) for name, thing in source.names.items() if is_public(name)]
            return
        for name in dict.fromkeys(source.exports):
            yield name, self._imported(source, name)

    # --- definitions ---

    def _run_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        names = [
            ast.unparse(item.func if isinstance(item, ast.Call) else item) for item in node.decorator_list
        ]
        last = [name.rpartition(".")[2] for name in names]
        before = self.scope.names.get(node.name)
        if {"setter", "deleter", "getter"} & set(last) and before:
            return
        doc = ast.get_docstring(node, clean=False) or ""
        if "overload" in last and before and not doc:
            return
        kind = PROPERTY if any(name.endswith("property") for name in last) else FUNCTION
        thing = Thing(kind, self.module.module, doc, COMPILED if self.is_stub else "")
        thing.documents = self.writes_doc and any(
            isinstance(inner, ast.Attribute) and inner.attr == "__doc__" for inner in ast.walk(node)
        )
        if not doc and any(self._documents(item) for item in node.decorator_list):
            thing.reason = TOGETHER
        if self.outer is None and _extends_all(node):
            self.extenders.add(node.name)
        if node.name == "__getattr__" and self.outer is None:
            self.module.ask = lambda: known_to(node, self)
        self.bind(node.name, thing)

    _run_AsyncFunctionDef = _run_FunctionDef

    def _run_ClassDef(self, node: ast.ClassDef) -> None:
        thing = Thing(CLASS, self.module.module, ast.get_docstring(node, clean=False) or "")
        thing.is_module = any(ast.unparse(item).endswith("ModuleType") for item in node.bases)
        thing.bases = [base for item in node.bases if isinstance(base := self.look(item), Thing)]
        heads = [
            item.func if isinstance(item, ast.Call) else item for item in (*node.decorator_list, *node.bases)
        ]
        if not thing.doc and any(ast.unparse(head).endswith(("dataclass", "NamedTuple")) for head in heads):
            thing.reason = FIELDS
        if any(self._documents(item) for item in node.decorator_list):
            thing.more = "a decorator of the class writes docstrings; mode=import reads them"
        if self.is_stub:
            thing.reason = thing.more = COMPILED
        Body(self.loader, self.module, thing, self.is_package, self.is_stub, self).run(node.body)
        self.bind(node.name, thing)

    def _documents(self, node: ast.expr) -> bool:
        """Whether a decorator or what is called is a function of the package that writes docstrings."""
        found = self.look_at(node.func if isinstance(node, ast.Call) else node)
        return isinstance(found, Thing) and found.documents

    # --- assignments ---

    def _run_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Call):
                if self.outer is None and attached(node.value, target, self):
                    continue
            elif isinstance(target, ast.Tuple | ast.List) and isinstance(node.value, ast.Tuple | ast.List):
                for part, value in zip(target.elts, node.value.elts, strict=False):
                    self._assign(part, value)
            else:
                self._assign(target, node.value)

    def _run_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assign(node.target, node.value)

    def _run_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name) and isinstance(node.op, ast.Add):
            if node.target.id == "__all__":
                self.module.exports = [*(self.module.exports or []), *self._exported(node.value)]
            elif node.target.id == "__doc__":
                self._document(self.scope, self.scope.doc + (text_of(node.value, self.look) or ""))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Attribute):
            owner = self.look(target.value)
            if isinstance(owner, Thing):
                if target.attr == "__doc__":
                    self._document(owner, text_of(value, self.look))
                elif thing := self._value(value, target.attr):
                    owner.names[target.attr] = thing
        elif isinstance(target, ast.Name) and target.id == "__all__":
            self.module.exports = list(self._exported(value))
        elif isinstance(target, ast.Name) and target.id == "__doc__":
            self._document(self.scope, text_of(value, self.look))
        elif isinstance(target, ast.Name):
            self._assign_name(target.id, value)

    def _assign_name(self, name: str, value: ast.expr) -> None:
        text = text_of(value, self.look)
        if text is not None:
            self.bind(name, Thing(VALUE, self.module.module, reason=MADE))
            self.texts[name] = text
            return
        if isinstance(value, ast.Dict | ast.List | ast.Set | ast.Tuple):
            self.tables[name] = value
        thing = self._value(value, name)
        if thing is not None:
            self.bind(name, thing)
        elif self.outer is None:
            self.bind(name, Thing(VALUE, self.module.module, reason=MADE))

    def _value(self, node: ast.expr, name: str) -> Thing | None:
        """What an expression gives, if that is something that has a docstring."""
        if isinstance(node, ast.Name | ast.Attribute):
            found = self.look(node)
            if found is None and isinstance(node, ast.Attribute):
                owner = self.look(node.value)
                if isinstance(owner, Thing) and owner.kind == MODULE and owner.is_compiled:
                    return self._imported(owner, node.attr)
            return found if isinstance(found, Thing) else None
        if not isinstance(node, ast.Call):
            return None
        made_by = ast.unparse(node.func).rpartition(".")[2]
        things = [found for item in node.args if isinstance(found := self.look_at(item), Thing)]
        if made_by in ("staticmethod", "classmethod") and things:
            return things[0]
        if made_by == "property":
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            getter = self.look_at(named["fget"]) if "fget" in named else next(iter(things), None)
            given = [named["doc"]] if "doc" in named else node.args[3:4]
            doc = text_of(given[0], self.look) if given else getter.doc if isinstance(getter, Thing) else ""
            return Thing(PROPERTY, self.module.module, doc or "", "" if doc is not None else TOGETHER)
        if made_by.endswith("namedtuple"):
            return Thing(CLASS, self.module.module, reason=FIELDS)
        if made_by.endswith("add_docstr") and len(node.args) == 2:
            return self._add_docstr(node)
        if self._documents(node):
            return Thing(FUNCTION, self.module.module, reason=TOGETHER)
        maker = self.look_at(node.func)
        if isinstance(maker, Thing) and maker.kind == CLASS and maker.is_module:
            return Thing(IMPORTED, self.module.module, reason=MADE)
        # What goes through a function and keeps its name was decorated.
        return next((thing for thing in things if thing is self.scope.names.get(name)), None)

    def look_at(self, node: ast.expr) -> Thing | str | None:
        """What an argument stands for."""
        return self.look(node) if isinstance(node, ast.Name | ast.Attribute) else None

    def _document(self, thing: Thing, text: str | None) -> None:
        thing.doc, thing.reason = text or "", "" if text is not None else TOGETHER
        if thing.kind in (VALUE, IMPORTED):
            thing.kind = FUNCTION

    def _exported(self, node: ast.expr) -> Iterator[str]:
        """The names in an expression that ``__all__`` is made of, as far as they can be told."""
        if isinstance(node, ast.BinOp):
            yield from self._exported(node.left)
            yield from self._exported(node.right)
        elif isinstance(node, ast.List | ast.Tuple | ast.Set):
            for item in node.elts:
                yield from self._exported(item.value) if isinstance(item, ast.Starred) else strings_in(item)
        elif isinstance(node, ast.Attribute) and node.attr == "__all__":
            owner = self.look(node.value)
            yield from (owner.exports or []) if isinstance(owner, Thing) else []
        elif isinstance(node, ast.Name) and node.id in self.tables:
            yield from strings_in(self.tables[node.id])
        elif isinstance(node, ast.Name) and node.id == "__all__":
            yield from self.module.exports or []
        elif isinstance(node, ast.Call) and len(node.args) == 1:
            yield from self._exported(node.args[0])

    # --- calls ---

    def _run_Expr(self, node: ast.Expr) -> None:
        call = node.value
        if not isinstance(call, ast.Call):
            return
        made_by = ast.unparse(call.func)
        if made_by.startswith("__all__.") and len(call.args) == 1:
            names = list(self._exported(call.args[0])) or strings_in(call.args[0])
            old = self.module.exports or []
            removed = set(names) if made_by.endswith("remove") else set()
            self.module.exports = [*(name for name in old if name not in removed)]
            self.module.exports += [] if removed else names
        elif made_by == "delattr" and len(call.args) == 2:
            if ast.unparse(call.args[0]) == "sys.modules[__name__]":
                self.module.names.pop(text_of(call.args[1], self.look) or "", None)
        elif made_by in self.extenders:
            owners = [owner for item in call.args if isinstance(owner := self.look_at(item), Thing)]
            names = [name for owner in owners for name in owner.exports or ()]
            self.module.exports = [*(self.module.exports or []), *names]
        elif made_by.endswith("add_docstr") and len(call.args) == 2:
            self._add_docstr(call)
        elif made_by.endswith("add_newdoc") and len(call.args) >= 3:
            self._add_newdoc(call)

    def _add_docstr(self, call: ast.Call) -> Thing | None:
        """``add_docstr(something, text)``, by which torch documents what is compiled."""
        target, text = call.args[0], text_of(call.args[1], self.look)
        if not isinstance(target, ast.Name | ast.Attribute):
            return None
        found = self.look(target)
        if not isinstance(found, Thing):
            owner = self.look(target.value) if isinstance(target, ast.Attribute) else None
            found = Thing(FUNCTION, self.module.module)
            if isinstance(owner, Thing) and isinstance(target, ast.Attribute):
                owner.names[target.attr] = found
        if text is not None or not found.doc:
            self._document(found, text)
        return found

    def _add_newdoc(self, call: ast.Call) -> None:
        """``add_newdoc(module, name, text)`` or ``(attribute, text)``, by which numpy does it."""
        place, name = (text_of(item, self.look) for item in call.args[:2])
        if not place or not name or not self.loader.is_inside(place):
            return
        owner = self.loader.load(place)
        if owner is None:
            return
        thing = self.loader.attribute(owner, name) or owner.names.setdefault(name, Thing(FUNCTION, place))
        given = call.args[2]
        for item in given.elts if isinstance(given, ast.List) else [given]:
            if isinstance(item, ast.Tuple) and len(item.elts) == 2:
                attribute, text = (text_of(part, self.look) for part in item.elts)
                thing.kind = CLASS
                if attribute:
                    member = thing.names.setdefault(attribute, Thing(FUNCTION, place))
                    self._document(member, text)
            else:
                self._document(thing, text_of(item, self.look))

    # --- control flow ---

    def _run_If(self, node: ast.If) -> None:
        told = self._truth(node.test)
        if told is not True:
            if told is False and ast.unparse(node.test) in _OFF:
                return
            self.run(node.orelse)
        if told is not False:
            name, text = _named(node.test)
            if name:
                self.texts[name] = text
            self.run(node.body)
            if name:
                self.texts.pop(name, None)

    def _run_Try(self, node: ast.Try) -> None:
        self._tries += bool(node.handlers)
        try:
            self.run(node.body)
            failed = False
        except Missing:
            failed = True
        finally:
            self._tries -= bool(node.handlers)
        if failed and node.handlers:
            self.run(node.handlers[0].body)
        else:
            self.run(node.orelse)
        self.run(node.finalbody)

    _run_TryStar = _run_Try

    def _run_With(self, node: ast.With) -> None:
        self.run(node.body)

    def _run_For(self, node: ast.For) -> None:
        self.run(node.body)

    _run_While = _run_For

    def _run_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.scope.names.pop(target.id, None)

    def _truth(self, test: ast.expr) -> bool | None:
        """Whether a condition holds, or None when only running it tells."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            parts = [self._truth(value) for value in test.values]
            settled = isinstance(test.op, ast.Or)
            return settled if settled in parts else None if None in parts else not settled
        if isinstance(test, ast.Constant):
            return bool(test.value)
        text = ast.unparse(test)
        if text in _OFF or text.startswith(("os.environ.get(", "os.getenv(")):
            return False  # a child has no variables but those that it needs
        return self._compared(test) if isinstance(test, ast.Compare) and len(test.ops) == 1 else None

    def _compared(self, test: ast.Compare) -> bool | None:
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
        if (
            isinstance(known, tuple)
            and isinstance(value, tuple)
            and kind in (ast.GtE, ast.Gt, ast.Lt, ast.LtE)
        ):
            return (known >= value) == (kind in (ast.GtE, ast.Gt))
        return None


def _named(test: ast.expr) -> tuple[str, str]:
    """The name and the text of ``name == "text"``, or nothing."""
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq):
        return "", ""
    left, right = test.left, test.comparators[0]
    if isinstance(left, ast.Name) and isinstance(right, ast.Constant) and isinstance(right.value, str):
        return left.id, right.value
    return "", ""


def _extends_all(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function seems to add the ``__all__`` of a module that it is given to that of its own."""
    if len(function.args.args) != 1:
        return False
    nodes = list(ast.walk(function))
    ours = any(isinstance(node, ast.Name) and node.id == "__all__" for node in nodes)
    return ours and any(isinstance(node, ast.Attribute) and node.attr == "__all__" for node in nodes)
