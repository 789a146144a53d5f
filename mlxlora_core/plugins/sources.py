"""The digest of a plugin's source, which shows whether the plugin was edited."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from mlxlora_core.plugins.plugin import Plugin

_WHOLE_BYTES = 1 << 20  # of a larger file, such as a library, size and time tell enough
_MADE = {"__pycache__"}


def source_digest(plugin: Plugin) -> str:
    """A digest of all files of a plugin's module or package; nothing where there are none to read.

    Its version does not tell that: a file named with ``-P`` has none, and one that is worked on,
    or installed a second time under the same name, keeps it.
    """
    digest = hashlib.sha256()
    found = False
    for name, path in _files(plugin):
        try:
            told = path.stat()
            content = path.read_bytes() if told.st_size <= _WHOLE_BYTES else str(told.st_mtime_ns).encode()
        except OSError:
            continue
        found = True
        digest.update(f"{name}\0{told.st_size}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()[:16] if found else ""


def _files(plugin: Plugin) -> Iterator[tuple[str, Path]]:
    """(name, path) of each file, in an order that does not change."""
    if plugin.origin == "file":
        yield "", Path(plugin.value)
        return
    module = plugin.value.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(module)  # of a name without a dot: imports nothing
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return
    if spec.submodule_search_locations is None:
        if spec.origin is not None:
            yield "", Path(spec.origin)
        return
    for folder in map(Path, spec.submodule_search_locations):
        below = (path for path in folder.rglob("*") if not _MADE & {*path.relative_to(folder).parts})
        for path in sorted(path for path in below if path.is_file()):
            yield path.relative_to(folder).as_posix(), path
