"""Mode ``static``: the docstrings that stand in the sources, read without running a line of them."""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import sys
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from mlxlora_docstrings.execute import MENTIONS, Body
from mlxlora_docstrings.findings import Findings
from mlxlora_docstrings.graph import (
    NO_DOCSTRING,
    PARTS_LIMIT,
    Child,
    Names,
    is_public,
    is_public_path,
    is_read,
    shortest_paths,
)
from mlxlora_docstrings.places import Places
from mlxlora_docstrings.things import CLASS, COMPILED, IMPORTED, MADE, MODULE, VALUE, Thing

SOURCE_BYTES = 16 << 20  # the largest source file that is read
_COMPILED = "it is compiled and has no stub; mode=import reads it"
_STUBBED = "it is compiled, and its stub may not tell all that it has; mode=import reads it"
_FRAMES = 5000  # of Python's stack: a chain of imports takes ten or so for each


def read(package: str, skip: frozenset[str], findings: Findings) -> None:
    """Read the sources of ``package`` and report every documented object.

    What is compiled is read from its stub (``.pyi``), if there is one.

    Args:
        package: what import takes.
        skip: modules whose sources ended or hung an earlier process.
        findings: takes the rows and the faults.
    """
    sys.setrecursionlimit(_FRAMES)
    gc.disable()  # syntax trees hold no cycles, and looking for some takes half of the time
    warnings.simplefilter("ignore")  # the parser's, of odd escapes
    sources = _Sources(package, skip, findings)
    sources.load_below(package)
    sources.report()


class _Sources:
    """The modules of one package, read in the order in which Python would import them."""

    def __init__(self, package: str, skip: frozenset[str], findings: Findings) -> None:
        self.package, self.skip, self.findings = package, skip, findings
        self.top = package.partition(".")[0]
        self.modules: dict[str, Thing | None] = {}
        self._places = Places(self.top)
        self._installed: dict[str, bool] = {}
        self._asking: set[tuple[str, str]] = set()
        self._values: dict[tuple[int, str], Thing] = {}
        self._public_classes: set[int] = set()
        self._all_names = Names()

    # --- modules ---

    def load(self, name: str) -> Thing | None:
        """The module of this full name and those above it, or None when there is none that can be read."""
        if name in self.modules:
            return self.modules[name]
        home, _, last = name.rpartition(".")
        if (home and self.load(home) is None) or not self.is_inside(name):
            return None
        if name in self.modules:  # what is above it has imported it
            return self.modules[name]
        place = self._places.find(name)
        if place is None or name in self.skip or name.count(".") >= PARTS_LIMIT:
            return None
        self.findings.at(name)
        thing = self.modules[name] = Thing(MODULE, name, is_compiled=place.is_compiled)
        try:
            if place.is_compiled:
                thing.reason, thing.more = (COMPILED, _STUBBED) if place.source else (_COMPILED, "")
            if place.source is not None:
                self._read(thing, place.source, place.is_package, place.is_compiled)
            elif place.is_compiled:
                self.findings.skip(name, _COMPILED)
        except Exception as fault:
            self.modules[name] = None
            self.findings.skip(name, fault)
            return None
        parent = self.modules.get(home)
        if parent is not None:
            parent.names[last] = thing
        return thing

    def load_below(self, name: str) -> None:
        """Read a module and those below it."""
        if self.load(name) is None and name == self.package:
            self.findings.skip(name, f"there is no module named '{name}'")
        for below in self._places.below(name) if name in self.modules else ():
            if is_read(f"{name}.{below}", self.package):
                self.load_below(f"{name}.{below}")

    def _read(self, thing: Thing, file: Path, is_package: bool, is_stub: bool) -> None:
        source = _source(file)
        tree = ast.parse(source)
        thing.doc = ast.get_docstring(tree, clean=False) or ""
        body = Body(self, thing, thing, is_package, is_stub)
        body.mentions = frozenset(text for text in MENTIONS if text in source)
        body.run(tree.body)

    def attribute(self, module: Thing, name: str) -> Thing | None:
        """What a name of a module stands for, made now if the module makes it when it is asked for."""
        if name in module.names:
            return module.names[name]
        self._ask(module)
        if name not in module.lazy or (module.module, name) in self._asking:
            return None
        self._asking.add((module.module, name))
        try:
            origin, inside = module.lazy[name]
            source = self.load(origin)
            found = self.attribute(source, inside) if source is not None and inside else source
            if found is None and inside:
                found = self.load(f"{origin}.{inside}")
        finally:
            self._asking.discard((module.module, name))
        if found is not None:
            module.names[name] = found
        return found

    def has(self, module: str, name: str) -> bool:
        """Whether there is a module of this name, and ``name`` in it, if that is something."""
        if self._places.find(module) is None:
            return False
        found = self.load(module)
        return found is not None and (not name or self.attribute(found, name) is not None)

    def _add_stub(self, module: Thing) -> None:
        """Give a module the names that the stub beside its source has and its source does not show."""
        place = self._places.find(module.module)
        if place is None or place.stub is None:
            return
        stub = Thing(MODULE, module.module)
        try:
            Body(self, stub, stub, place.is_package, is_stub=True).run(ast.parse(_source(place.stub)).body)
        except Exception as fault:
            self.findings.skip(module.module, fault)
            return
        for name, thing in stub.names.items():
            _merge(module, name, thing)

    def stub_imports(self, module: Thing) -> dict[str, tuple[str, str]]:
        """What the stub beside the source of a module imports: name -> (module, name in it)."""
        place = self._places.find(module.module)
        if place is None or place.stub is None:
            return {}
        body = Body(self, module, module, place.is_package, is_stub=True)
        found: dict[str, tuple[str, str]] = {}
        for node in ast.parse(_source(place.stub)).body:
            if isinstance(node, ast.ImportFrom):
                origin = body.origin(node)
                for alias in node.names:
                    below = f"{origin}.{alias.name}"
                    is_module = origin == module.module and self._places.find(below) is not None
                    found[alias.asname or alias.name] = (below, "") if is_module else (origin, alias.name)
        return found

    def is_there(self, name: str) -> bool:
        """Whether a top-level module of another package is installed."""
        if name not in self._installed:
            try:
                self._installed[name] = (
                    name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None
                )
            except (ImportError, ValueError):
                self._installed[name] = False
        return self._installed[name]

    def is_inside(self, name: str) -> bool:
        """Whether a module is of the package that is read."""
        return name == self.top or name.startswith(self.top + ".")

    def _ask(self, module: Thing) -> None:
        """Have a module tell what its ``__getattr__`` knows."""
        ask, module.ask = module.ask, None
        if ask is not None:
            module.lazy.update(ask())
            module.ask = ask  # its tables may not be complete yet

    # --- the report ---

    def report(self) -> None:
        """Report every documented object under its best path."""
        modules = [(name, module) for name, module in sorted(self.modules.items()) if module is not None]
        for _, module in modules:
            self._ask(module)
            module.ask = None
            self._add_stub(module)
            for name in (*module.lazy, *(module.exports or ())):
                if self.attribute(module, name) is None and name in (module.exports or ()):
                    module.names[name] = Thing(VALUE, module.module, reason=MADE)
        wanted = [(name, module) for name, module in modules if self._is_wanted(name)]
        self._public_classes = {
            id(thing)
            for path, module in wanted
            if is_public_path(path)
            for name, thing in module.names.items()
            if thing.kind == CLASS and is_public(name)
        }
        declared = {
            id(module.names[name]) for _, module in wanted for name in module.exports or () if is_public(name)
        }
        for path, thing in shortest_paths(wanted, self._children, id):
            if is_public(path.rpartition(".")[2]):
                self._tell(path, thing, id(thing) in declared)
        for source, reason in self._all_names.others():
            self.findings.skip(source, reason)

    def _tell(self, path: str, thing: Thing, is_declared: bool) -> None:
        if is_public_path(path) and thing.kind in (MODULE, CLASS):
            more = next((base.more for base in self._own(thing) if base.more), "")
            if more:
                self.findings.skip(f"{path}.*", more)
        doc = inspect.cleandoc(thing.doc)
        if doc:
            self.findings.row(path, doc)
            self._all_names.tell(path, id(thing))
        elif is_public_path(path) and (thing.reason or is_declared):
            self.findings.skip(path, thing.reason or NO_DOCSTRING)

    def _own(self, thing: Thing) -> Iterator[Thing]:
        """A class and those of its bases that have no public name: their members are its own."""
        return (base for base in thing.lineage() if base is thing or id(base) not in self._public_classes)

    def _children(self, path: str, thing: Thing) -> Iterator[Child[Thing]]:
        if thing.kind == MODULE:
            listed = set(thing.exports or ())
            for name, child in thing.names.items():
                if not is_public(name):
                    continue
                if child.kind == VALUE:
                    if name in listed:
                        yield Child(
                            name, False, self._values.setdefault((id(child), name), Thing(**vars(child)))
                        )
                # Any other module is an import for the module's own use, and no name of it.
                elif child.kind != MODULE or name in listed or child.module.startswith(thing.module + "."):
                    self._all_names.stand(path, name, False, id(child))
                    yield Child(name, False, child)
        elif thing.kind == CLASS:
            seen: set[str] = set()
            for base in thing.lineage():
                for name, child in base.names.items():
                    if is_public(name) and name not in seen and child.kind not in (VALUE, MODULE):
                        if base is thing:
                            self._all_names.stand(path, name, True, id(child))
                        yield Child(name, base is not thing and id(base) in self._public_classes, child)
                    seen.add(name)

    def _is_wanted(self, name: str) -> bool:
        return (name == self.package or name.startswith(self.package + ".")) and is_read(name, self.package)


def _merge(owner: Thing, name: str, thing: Thing) -> None:
    """Give a module or a class what a stub has under ``name``, unless more is known of it."""
    found = owner.names.get(name)
    if found is None or found.kind in (VALUE, IMPORTED):
        if thing.kind not in (VALUE, MODULE):
            owner.names[name] = Thing(**vars(thing))  # a base of several has it once for each
    elif found.kind == thing.kind == CLASS and found.module != thing.module:
        for base in thing.lineage():
            for member, inside in base.names.items():
                _merge(found, member, inside)


def _source(file: Path) -> str:
    """The text of a source.

    Raises:
        MemoryError: it is too large.
        OSError, SyntaxError, ValueError: as reading it does.
    """
    if file.stat().st_size > SOURCE_BYTES:
        raise MemoryError(f"its source has more than {SOURCE_BYTES} bytes")
    with tokenize.open(file) as lines:  # as Python does: byte order mark, coding cookie
        return lines.read()
