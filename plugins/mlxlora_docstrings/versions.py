"""Which version of a package is read, told without importing it."""

from __future__ import annotations

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
    """Package -> its version, or the state of its sources when it is no part of a distribution."""
    known = versions(packages)
    return {package: known.get(package) or _state(package.partition(".")[0]) for package in packages}


def _state(top: str) -> str:
    """How many files a package has, how large they are and when the last one changed."""
    try:
        spec = importlib.util.find_spec(top)  # of a name without a dot: imports nothing
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "not installed"
    folders = spec.submodule_search_locations
    files = [
        file.stat()
        for folder in folders or ()
        for file in Path(folder).rglob("*")
        if file.suffix in SUFFIXES and file.is_file()
    ]
    if folders is None and spec.origin and Path(spec.origin).is_file():
        files = [Path(spec.origin).stat()]
    newest = max((file.st_mtime_ns for file in files), default=0)
    return f"{len(files)} files, {sum(file.st_size for file in files)} bytes, changed {newest}"
