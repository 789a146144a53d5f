"""What the statements of a module or a class bind, told without running them.

This follows imports, definitions, aliases, ``__all__`` and docstrings in the
order in which Python would run the statements. A condition that cannot be told
is taken both ways. Whatever else a statement does is passed over.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from mlxlora_docstrings.declared import called, exported, extends_all
from mlxlora_docstrings.expressions import value_of
from mlxlora_docstrings.flow import Flow, Missing, Returned
from mlxlora_docstrings.fold import Unknown, folded, text_of
from mlxlora_docstrings.graph import is_public
from mlxlora_docstrings.lazy import attached, known_to
from mlxlora_docstrings.things import (
    CLASS,
    COMPILED,
    DECORATED,
    FIELDS,
    FUNCTION,
    GIVEN,
    IMPORTED,
    MADE,
    MODULE,
    PROPERTY,
    REPLACED,
    TOGETHER,
    VALUE,
    Loader,
    Thing,
)

MENTIONS = (
    ".__doc__",
    ".__all__",
    "dataclass",
    "add_docstr",
    "add_newdoc",
)  # what is looked for in functions, where it is anywhere


_DOCUMENTING = {".__doc__", "add_docstr", "add_newdoc"}


class Body(Flow):
    """Runs the body of a module, or of a class in one.

    Args:
        loader: for what is imported.
        module: the module.
        scope: the module or the class.
        is_package: whether relative imports start at the module itself.
        is_stub: whether it is a stub of something that is compiled.
        outer: the body of the module around a class.

    Attributes:
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
        super().__init__(module, scope)
        self.loader = loader
        self.is_package, self.is_stub, self.outer = is_package, is_stub, outer
        self.depth: int = outer.depth + 1 if outer else 0
        self.mentions: frozenset[str] = outer.mentions if outer else frozenset()
        self.extenders: set[str] = set()  # functions that add the ``__all__`` of what they are given to ours

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

    # --- imports ---

    def _run_Import(self, node: ast.Import) -> None:
        for alias in () if self.is_stub else node.names:
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            if self.loader.is_inside(alias.name):
                thing = self.loader.load(alias.name)
                if thing is None and self.tries:
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
        if inside and source is None and self.tries:
            raise Missing
        for alias in node.names:
            if alias.name == "*":
                for name, thing in self._star(source):
                    self.bind(name, thing)
                if not inside and self.outer is None:
                    self.module.more = f"it takes what {origin} has; mode=import reads it"
                elif source is not None and source.more:
                    self.module.more = source.more
                continue
            if source is not None and alias.name in ("__all__", "__doc__"):
                if alias.name == "__all__":
                    self.module.exports = list(source.exports or ())
                else:
                    self.document(self.scope, source.doc)
                continue
            if source is not None:
                thing = self.imported(source, alias.name)
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

    def imported(self, source: Thing, name: str) -> Thing:
        """What an import of ``name`` from a module gives.

        Raises:
            Missing: nothing, and something else is done then.
        """
        found = self.loader.attribute(source, name) or self.loader.load(f"{source.module}.{name}")
        if found is None:
            found = Thing(IMPORTED, source.module, reason=MADE)
            if self.tries and not source.is_compiled:
                self.bind(name, found)  # unless what is done instead does better
                raise Missing
            source.names[name] = found
        return found

    def _foreign(self, module: str, name: str) -> Thing:
        if self.tries and not self.loader.is_there(module.partition(".")[0]):
            raise Missing
        return Thing(VALUE, name, reason=f"it is of another package ({module}); mode=import reads it")

    def _star(self, source: Thing | None) -> Iterator[tuple[str, Thing]]:
        if source is None:
            return
        if source.exports is None:
            yield from [(name, thing) for name, thing in source.names.items() if is_public(name)]
            return
        for name in dict.fromkeys(source.exports):
            yield name, self.imported(source, name)

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
        thing.documents = bool(self.mentions & {".__doc__", "dataclass"}) and any(
            isinstance(inner, ast.Attribute) and inner.attr in ("__doc__", "dataclass")
            for inner in ast.walk(node)
        )
        if not doc and any(self.documents(item) for item in node.decorator_list):
            thing.reason = TOGETHER
        elif not doc and any(self._is_made(item) for item in node.decorator_list):
            thing.reason = DECORATED
        if self.outer is None and ".__all__" in self.mentions and extends_all(node):
            self.extenders.add(node.name)
        if self.outer is None and self.mentions & {"add_docstr", "add_newdoc"}:
            thing.apply = lambda values, named: self._apply(node, values, named)
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
        if any(self.documents(item) for item in node.decorator_list):
            thing.more = "a decorator of the class writes docstrings; mode=import reads them"
            thing.reason = "" if thing.doc else TOGETHER
        if self.is_stub:
            thing.reason = thing.more = COMPILED
        Body(self.loader, self.module, thing, self.is_package, self.is_stub, self).run(node.body)
        self.bind(node.name, thing)

    def documents(self, node: ast.expr) -> bool:
        """Whether a decorator or what is called is a function of the package that writes docstrings."""
        found = self.look_at(node.func if isinstance(node, ast.Call) else node)
        return isinstance(found, Thing) and found.documents

    def _is_made(self, node: ast.expr) -> bool:
        """Whether a decorator is something of the package, but no function that can be looked at."""
        found = self.look_at(node.func if isinstance(node, ast.Call) else node)
        return isinstance(found, Thing) and found.kind == VALUE and self.loader.is_inside(found.module)

    # --- assignments ---

    def _run_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Call):
                if self.outer is None and attached(node.value, target, self):
                    continue
            else:
                self.assign(target, node.value)

    def _run_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, node.value)

    def _run_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name) and isinstance(node.op, ast.Add):
            if node.target.id == "__all__":
                self.module.exports = [*(self.module.exports or []), *exported(node.value, self)]
            elif node.target.id == "__doc__":
                self.document(self.scope, self.scope.doc + (text_of(node.value, self) or ""))
            else:
                self.assign(node.target, ast.BinOp(ast.Name(node.target.id), node.op, node.value))

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        """``target = value``."""
        if isinstance(target, ast.Tuple | ast.List):
            if isinstance(value, ast.Tuple | ast.List):
                for part, given in zip(target.elts, value.elts, strict=False):
                    self.assign(part, given)
        elif isinstance(target, ast.Subscript):
            self._assign_item(target, value)
        elif isinstance(target, ast.Attribute):
            self._assign_attribute(target, value)
        elif isinstance(target, ast.Name) and target.id == "__all__":
            self.module.exports = list(exported(value, self))
        elif isinstance(target, ast.Name) and target.id == "__doc__":
            self.document(self.scope, text_of(value, self))
        elif isinstance(target, ast.Name):
            self._assign_name(target.id, value)

    def _assign_item(self, target: ast.Subscript, value: ast.expr) -> None:
        """``globals()[name] = something``, or ``sys.modules[__name__] = something``."""
        owner = ast.unparse(target.value)
        if ast.unparse(target) == "sys.modules[__name__]":
            self.module.more = REPLACED
        elif isinstance(target.value, ast.Name):
            self._forget(target.value)
        elif owner == "globals()":
            name = text_of(target.slice, self)
            if name is None:
                self.module.more = GIVEN
            else:
                self.assign(ast.Name(name), value)

    def _forget(self, name: ast.Name) -> None:
        """What a name stands for changes in a way that is not followed."""
        found = self.look(name)
        if isinstance(found, Thing):
            found.value = None

    def _assign_attribute(self, target: ast.Attribute, value: ast.expr) -> None:
        owner = self.look(target.value)
        if not isinstance(owner, Thing):
            return
        if target.attr == "__doc__":
            self.document(owner, text_of(value, self))
        elif thing := value_of(value, target.attr, self):
            owner.names[target.attr] = thing
        elif isinstance(value, ast.Call):
            old = owner.names.get(target.attr)
            if old and any(self.look_at(item) is old for item in value.args):
                owner.names[target.attr] = Thing(**vars(old))  # decorated, under this name alone

    def _assign_name(self, name: str, value: ast.expr) -> None:
        is_table = isinstance(value, ast.Dict | ast.List | ast.Set | ast.Tuple)
        try:
            known = None if is_table and not self.mentions & _DOCUMENTING else folded(value, self)
        except Unknown:
            known = None
        if isinstance(known, str):
            self.keep(name, known)
            return
        if is_table:
            self.tables[name] = value
        thing = value_of(value, name, self)
        if thing is not None:
            self.bind(name, thing)
        elif self.scope.kind != CLASS:
            self.keep(name, None if self.doubts else known)

    def known(self, node: ast.Name | ast.Attribute) -> Any:
        """The text or table that a name stands for.

        Raises:
            Unknown: only running it tells.
        """
        found = self.look(node)
        value = found.value if isinstance(found, Thing) else found
        if value is None:
            raise Unknown
        return value

    def holds(self, test: ast.expr) -> bool | None:
        """Whether a condition over what is known holds."""
        try:
            return bool(folded(test, self))
        except Unknown:
            return None

    def keep(self, name: str, value: Any) -> None:
        """Have a name stand for a text, a table or a truth value."""
        self.bind(name, Thing(VALUE, self.module.module, reason=MADE, value=value))
        if isinstance(value, str):
            self.texts[name] = value

    def _apply(
        self, function: ast.FunctionDef | ast.AsyncFunctionDef, values: list[Any], named: dict[str, Any]
    ) -> Any:
        """What a function of the module gives; its statements are followed like any other."""
        place = Thing(FUNCTION, self.module.module)
        inner = Body(self.loader, self.module, place, self.is_package, self.is_stub, self)
        if inner.depth > 5:
            raise Unknown
        names = [item.arg for item in function.args.args]
        for name, default in zip(reversed(names), reversed(function.args.defaults), strict=False):
            inner.assign(ast.Name(name), default)
        given = dict(zip(names, values, strict=False)) | named
        if function.args.vararg:
            given[function.args.vararg.arg] = tuple(values[len(names) :])
        for name, value in given.items():
            inner.keep(name, value)
        try:
            inner.run(function.body)
        except Returned as returned:
            return returned.value
        return None

    def _run_Return(self, node: ast.Return) -> None:
        if self.doubts or self.tries:
            raise Unknown
        raise Returned(folded(node.value, self))

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
            method = node.value.func
            if isinstance(method, ast.Attribute) and isinstance(method.value, ast.Name):
                self._forget(method.value)
