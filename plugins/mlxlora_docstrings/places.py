"""Where the modules of a package lie, told from its folders; nothing is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from pkgutil import iter_modules


@dataclass(frozen=True)
class Place:
    """Where a module lies.

    Attributes:
        source: its source, or the stub of what is compiled; a namespace has none, nor has what has no stub.
        stub: the stub beside its source.
        folders: where the modules below a package lie.
        is_compiled: whether its source is no Python, or only a stub.
        is_package: whether modules may be below it.
        is_namespace: whether it is a folder and nothing else, which nobody looks into on his own.
    """

    source: Path | None
    stub: Path | None = None
    folders: tuple[Path, ...] = ()
    is_compiled: bool = False
    is_package: bool = False
    is_namespace: bool = False


class Places:
    """Finds the modules of one package."""

    def __init__(self, top: str) -> None:
        self._known: dict[str, Place | None] = {top: _top(top)}
        self._listings: dict[tuple[Path, bool], dict[str, Place]] = {}

    def find(self, name: str) -> Place | None:
        """Where the module of this full name lies."""
        if name not in self._known:
            home, _, last = name.rpartition(".")
            parent = self.find(home) if home else None
            self._known[name] = self._inside(parent, last) if parent else None
        return self._known[name]

    def below(self, name: str) -> list[str]:
        """The modules in a package, sorted; what no ``__init__`` makes one is passed over in a package."""
        place = self.find(name)
        found: dict[str, Place] = {}
        for folder in place.folders if place else ():
            for child, where in self._listing(folder, place is not None and place.is_compiled).items():
                found.setdefault(child, where)
        modules = {child for child, where in found.items() if not where.is_namespace}
        if place is not None and place.is_package and place.source is None and not place.is_compiled:
            modules |= namespaces_in(place.folders) & found.keys()
        return sorted(modules)

    def _inside(self, parent: Place, name: str) -> Place | None:
        places = [self._listing(folder, parent.is_compiled).get(name) for folder in parent.folders]
        found = [place for place in places if place is not None]
        return next((place for place in found if not place.is_namespace), found[0] if found else None)

    def _listing(self, folder: Path, is_compiled: bool) -> dict[str, Place]:
        key = folder, is_compiled
        if key not in self._listings:
            self._listings[key] = _listing(folder, is_compiled)
        return self._listings[key]


def namespaces_in(folders: Iterable[str | Path], levels: int = 4) -> set[str]:
    """The public folders without ``__init__`` in a namespace's that hold modules, so many levels deep."""
    names = set()
    for folder in map(Path, folders):
        with suppress(OSError):
            for entry in folder.iterdir():
                public = entry.name.isidentifier() and not entry.name.startswith("_")
                if public and not (entry / "__init__.py").exists() and entry.is_dir():
                    modules = any(info.name.isidentifier() for info in iter_modules([str(entry)]))
                    if modules or (levels and namespaces_in([entry], levels - 1)):
                        names.add(entry.name)
    return names


def _top(name: str) -> Place | None:
    """Where a top-level module lies; for a name without a dot, Python looks at folders only."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = tuple(Path(folder) for folder in spec.submodule_search_locations or ())
    if spec.submodule_search_locations is not None and spec.origin is None:
        return Place(None, folders=folders, is_package=True)
    # What is frozen into Python says where its source lies.
    frozen = getattr(spec.loader_state, "filename", None) if spec.origin == "frozen" else None
    origin = Path(frozen or spec.origin or "")
    if origin.suffix == ".py":
        return Place(origin, _file(origin.with_suffix(".pyi")), folders, is_package=bool(folders))
    stub = _file(origin.with_name(origin.name.partition(".")[0] + ".pyi"))
    return Place(stub, None, folders, is_compiled=True, is_package=bool(folders))


def _listing(folder: Path, is_compiled: bool) -> dict[str, Place]:
    """The modules in a folder; in that of stubs for a compiled package, stubs are modules too."""
    try:
        entries = {path.name: path for path in folder.iterdir()}
    except OSError:
        return {}
    built = {name.partition(".")[0] for name in entries if name.endswith(tuple(EXTENSION_SUFFIXES))}
    found: dict[str, Place] = {}
    for name in {entry.partition(".")[0] for entry in entries}:
        place = _place(entries, name, is_compiled or name in built) if name.isidentifier() else None
        if place is not None:
            found[name] = place
        elif name in built:
            found[name] = Place(None, is_compiled=True)
    return found


def _place(entries: dict[str, Path], name: str, is_compiled: bool) -> Place | None:
    folder = entries.get(name)
    if folder is not None and folder.is_dir():
        source, stub = _file(folder / "__init__.py"), _file(folder / "__init__.pyi")
        if source:
            return Place(source, stub, (folder,), is_package=True)
        if stub and is_compiled:
            return Place(stub, None, (folder,), is_compiled=True, is_package=True)
    source, stub = (_file(entries.get(name + suffix)) for suffix in (".py", ".pyi"))
    if source:
        return Place(source, stub)
    if stub and is_compiled:
        return Place(stub, is_compiled=True)
    if folder is not None and not is_compiled and folder.is_dir():
        return Place(None, folders=(folder,), is_package=True, is_namespace=True)
    return None


def _file(path: Path | None) -> Path | None:
    """The path, if an ordinary file is there."""
    return path if path is not None and path.is_file() else None
