"""Which version of a package is read, told without importing it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".so", ".pyd")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version of the distribution that brought it, or of Python for its own library.

    A package of neither is left out.
    """
    owners = importlib.metadata.packages_distributions()
    found = {}
    for package in packages:
        top = package.partition(".")[0]
        names = sorted({name for name in owners.get(top, ()) if name})
        if top in names:
            names = [top]  # others, such as backends, put files into the same package
        if names:
            found[package] = ", ".join(importlib.metadata.version(name) for name in names)
        elif top in sys.stdlib_module_names:
            found[package] = platform.python_version()
    return found


def states(packages: Iterable[str]) -> dict[str, str]:
    """Package -> its version and the state of its sources, which may be edited under the same version."""
    known = versions(packages)
    return {p: f"{known.get(p, '')} {_state(p.partition('.')[0])}".strip() for p in packages}


def _state(top: str) -> str:
    """How many files a package has, and a digest of their names, sizes and times of change."""
    try:
        spec = importlib.util.find_spec(top)  # of a name without a dot: imports nothing
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [(file.relative_to(folder), file) for folder in folders for file in folder.rglob("*")]
    if spec.submodule_search_locations is None and spec.origin:
        files = [(Path(Path(spec.origin).name), Path(spec.origin))]
    digest, count = hashlib.sha256(), 0
    for name, file in sorted(files):
        if file.is_file() and name.suffix in SUFFIXES:
            told = file.stat()
            digest.update(f"{name}\0{told.st_size}\0{told.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
            count += 1
    return f"{count} files {digest.hexdigest()[:16]}"
