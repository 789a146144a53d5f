"""What the statements of a module or a class bind, told without running them.

This follows imports, definitions, aliases, ``__all__`` and docstrings in the
order in which Python would run the statements. A condition that cannot be told
is taken both ways. Whatever else a statement does is passed over.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from mlxlora_docstrings.conditions import named, truth
from mlxlora_docstrings.declared import add_docstr, called, exported, extends_all
from mlxlora_docstrings.graph import is_public
from mlxlora_docstrings.lazy import attached, known_to
from mlxlora_docstrings.things import (
    CLASS,
    FUNCTION,
    IMPORTED,
    MODULE,
    PROPERTY,
    VALUE,
    Loader,
    Thing,
    text_of,
)

COMPILED = "its docstring is compiled; mode=import reads it"
MADE = "it is made when the package runs; mode=import reads it"
FIELDS = "its docstring is made of its fields when the package runs; mode=import reads it"
TOGETHER = "its docstring is put together when the package runs; mode=import reads it"
MENTIONS = (".__doc__", ".__all__")  # what is looked for in functions, where it is anywhere


class Missing(Exception):
    """An import that fails, where something else is done then."""


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
        mentions: which of :data:`MENTIONS` stand in the source at all.
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
        self.mentions: frozenset[str] = outer.mentions if outer else frozenset()
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
            if found is None and self.is_stub and node.id in self.module.lazy:
                return self.loader.attribute(self.module, node.id)
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
                    self.document(self.scope, source.doc)
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
            found = Thing(IMPORTED, source.module, reason=MADE)
            if self._tries and not source.is_compiled:
                self.bind(name, found)  # unless what is done instead does better
                raise Missing
            source.names[name] = found
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
        thing.documents = ".__doc__" in self.mentions and any(
            isinstance(inner, ast.Attribute) and inner.attr == "__doc__" for inner in ast.walk(node)
        )
        if not doc and any(self._documents(item) for item in node.decorator_list):
            thing.reason = TOGETHER
        if self.outer is None and ".__all__" in self.mentions and extends_all(node):
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
                self.module.exports = [*(self.module.exports or []), *exported(node.value, self)]
            elif node.target.id == "__doc__":
                self.document(self.scope, self.scope.doc + (text_of(node.value, self.look) or ""))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Subscript) and ast.unparse(target) == "sys.modules[__name__]":
            self.module.more = "it puts something else in its place; mode=import reads that"
        if isinstance(target, ast.Attribute):
            owner = self.look(target.value)
            if isinstance(owner, Thing):
                if target.attr == "__doc__":
                    self.document(owner, text_of(value, self.look))
                elif thing := self._value(value, target.attr):
                    owner.names[target.attr] = thing
        elif isinstance(target, ast.Name) and target.id == "__all__":
            self.module.exports = list(exported(value, self))
        elif isinstance(target, ast.Name) and target.id == "__doc__":
            self.document(self.scope, text_of(value, self.look))
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
            return add_docstr(node, self)
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

    def document(self, thing: Thing, text: str | None) -> None:
        """Give something a docstring; None is one that only running tells."""
        thing.doc, thing.reason = text or "", "" if text is not None else TOGETHER
        if thing.kind in (VALUE, IMPORTED):
            thing.kind = FUNCTION

    def _run_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            called(node.value, self)

    # --- control flow ---

    def _run_If(self, node: ast.If) -> None:
        told = truth(node.test)
        if told is not True:
            self.run(node.orelse)
        if told is not False:
            name, text = named(node.test)
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
