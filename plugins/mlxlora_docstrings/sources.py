"""Mode ``static``: the docstrings that stand in the sources, read without running a line of them."""

from __future__ import annotations

import importlib.util
import logging
import tokenize
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import griffe

from mlxlora_docstrings.findings import Findings
from mlxlora_docstrings.graph import PARTS_LIMIT, Child, is_public, is_read, shortest_paths

SOURCE_BYTES = 16 << 20  # the largest source file that is read
_ALL = ".__all__"


def read(package: str, skip: frozenset[str], findings: Findings) -> None:
    """Parse the sources of ``package`` and report every documented object.

    What is compiled is read from its stub (``.pyi``), if there is one.

    Args:
        package: what import takes.
        skip: modules whose sources ended or hung an earlier process.
        findings: takes the rows and the faults.
    """
    logging.disable(logging.CRITICAL)  # griffe speaks of annotations, which are not read here
    sources = _Sources(package, skip, findings)
    top = package.partition(".")[0]
    # For a name without a dot this looks at folders and imports nothing.
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        findings.skip(package, f"there is no module named '{top}'")
    elif spec.submodule_search_locations is None:
        sources.load_file(top, Path(spec.origin or ""), None)
    else:
        sources.load_folders(top, [Path(folder) for folder in spec.submodule_search_locations], None)
    sources.report()


class _Sources:
    """The modules of one package, parsed."""

    def __init__(self, package: str, skip: frozenset[str], findings: Findings) -> None:
        self.package, self.skip, self.findings = package, skip, findings
        self.modules: dict[str, griffe.Module] = {}
        self._names: dict[str, dict[str, griffe.Object | griffe.Alias]] = {}

    def load_folders(self, name: str, folders: list[Path], parent: griffe.Module | None) -> None:
        """Parse a package that lies in ``folders``, and what is below it."""
        initial = next(
            (file for folder in folders for file in _either(folder / "__init__") if file.is_file()), None
        )
        module = self.load_file(name, initial, parent) if initial else _namespace(name, parent)
        if module is None or name.count(".") >= PARTS_LIMIT:
            return
        for folder in folders:
            for child, path in _below(folder):
                full = f"{name}.{child}"
                if full in self.modules or not self._is_read(full):
                    continue
                if path.is_dir():
                    self.load_folders(full, [path], module)
                else:
                    self.load_file(full, path, module)

    def load_file(self, name: str, file: Path, parent: griffe.Module | None) -> griffe.Module | None:
        """Parse one source or stub; None, and a reason among the findings, when that cannot be done."""
        if name in self.skip:
            return None
        self.findings.at(name)
        try:
            if file.suffix not in (".py", ".pyi"):
                raise ImportError("it is compiled and has no stub; mode=import reads it")
            if file.stat().st_size > SOURCE_BYTES:
                raise MemoryError(f"its source has more than {SOURCE_BYTES} bytes")
            with tokenize.open(file) as lines:  # as Python does: byte order mark, coding cookie
                code = lines.read()
            module = griffe.visit(name.rpartition(".")[2], file, code, parent=parent)
        except Exception as fault:
            self.findings.skip(name, fault)
            return None
        self.modules[name] = module
        return module

    def report(self) -> None:
        """Report every documented object under its best path."""
        starts: list[tuple[str, griffe.Object]] = [
            (name, module) for name, module in sorted(self.modules.items()) if self._is_wanted(name)
        ]
        for path, thing in shortest_paths(starts, self._children, id):
            if thing.docstring and thing.docstring.value and is_public(path.rpartition(".")[2]):
                self.findings.row(path, thing.docstring.value)

    def _children(self, path: str, thing: griffe.Object) -> Iterator[Child[griffe.Object]]:
        if isinstance(thing, griffe.Module):
            listed = set(self._exported(thing, set())) if thing.exports else set()
            for name in self._names_in(thing):
                child = self._resolve(f"{thing.path}.{name}", set()) if is_public(name) else None
                # Any other module is an import for the module's own use, and no name of it.
                own = not isinstance(child, griffe.Module) or child.path.startswith(thing.path + ".")
                if child is not None and (own or name in listed):
                    yield Child(name, False, child)
        elif isinstance(thing, griffe.Class):
            for name, member in thing.members.items():
                if is_public(name) and isinstance(member, griffe.Object) and _is_documentable(member):
                    yield Child(name, False, member)

    def _names_in(self, module: griffe.Module) -> dict[str, griffe.Object | griffe.Alias]:
        """What a module's names stand for, ``from x import *`` written out."""
        if module.path in self._names:
            return self._names[module.path]
        names = self._names[module.path] = {}  # already there when star imports run in a circle
        explicit: dict[str, griffe.Object | griffe.Alias] = {}
        for name, member in module.members.items():
            if not isinstance(member, griffe.Alias) or member.wildcard is None:
                explicit[name] = member
            else:
                origin = self._resolve(member.wildcard, set())
                if isinstance(origin, griffe.Module):
                    there = self._names_in(origin)
                    names.update((n, there[n]) for n in self._exported(origin, set()) if n in there)
        names.update(explicit)
        return names

    def _exported(self, module: griffe.Module, trail: set[str]) -> Iterator[str]:
        """The names that ``from module import *`` gives."""
        if module.path in trail:
            return
        trail.add(module.path)
        if not module.exports:  # absent, or made in a way that only running it tells
            yield from filter(is_public, self._names_in(module))
            return
        for item in module.exports:
            if isinstance(item, str):
                yield item
            elif item.path.endswith(_ALL):
                other = self._resolve(f"{module.path}.{item.path.removesuffix(_ALL)}", set())
                if isinstance(other, griffe.Module):
                    yield from self._exported(other, trail)

    def _resolve(self, path: str, trail: set[str]) -> griffe.Object | None:
        """The documentable object of this package that ``path`` stands for, or None."""
        if path in trail:
            return None
        trail.add(path)
        home, _, name = path.rpartition(".")
        if not home:
            return self.modules.get(path)
        owner = self._resolve(home, trail) if home not in self.modules else self.modules[home]
        found: griffe.Object | griffe.Alias | None = None
        if isinstance(owner, griffe.Module):
            found = self._names_in(owner).get(name)
            path = f"{owner.path}.{name}"
        elif isinstance(owner, griffe.Class):
            found = owner.members.get(name)
        if isinstance(found, griffe.Alias):
            return self._resolve(found.target_path, trail) or self.modules.get(path)
        if found is not None:
            return found if _is_documentable(found) else None
        return self.modules.get(path)

    def _is_wanted(self, name: str) -> bool:
        return name == self.package or name.startswith(self.package + ".")

    def _is_read(self, name: str) -> bool:
        """Whether ``name`` is on the way to the wanted package, or in it and worth reading."""
        on_the_way = self.package.startswith(name + ".")
        return on_the_way or (self._is_wanted(name) and is_read(name, self.package))


def _namespace(name: str, parent: griffe.Module | None) -> griffe.Module:
    """A package without ``__init__``: a name and no content."""
    return griffe.Module(name.rpartition(".")[2], parent=parent)


def _either(stem: Path) -> tuple[Path, Path]:
    """The source of a module and its stub."""
    return stem.with_name(stem.name + ".py"), stem.with_name(stem.name + ".pyi")


def _below(folder: Path) -> list[tuple[str, Path]]:
    """(name, file or folder) of the modules in a folder, sorted; a source goes before a stub."""
    found: dict[str, Path] = {}
    ranked = []
    for path in folder.iterdir():
        if path.is_dir():
            # Without __init__ it is no package, and a script in it runs when it is meant to run.
            if any(file.is_file() for file in _either(path / "__init__")):
                ranked.append((0, path.name, path))
        elif path.suffix in (".py", ".pyi") and path.is_file():
            ranked.append((1 if path.suffix == ".py" else 2, path.stem, path))
        elif path.name.endswith(tuple(EXTENSION_SUFFIXES)):
            ranked.append((3, path.name.partition(".")[0], path))
    for _, name, path in sorted(ranked):
        if name.isidentifier():
            found.setdefault(name, path)
    return sorted(found.items())


def _is_documentable(thing: griffe.Object | griffe.Alias) -> bool:
    """Whether ``inspect.getdoc`` could tell its docstring: not that of a value."""
    return isinstance(thing, (griffe.Module, griffe.Class, griffe.Function)) or "property" in thing.labels
