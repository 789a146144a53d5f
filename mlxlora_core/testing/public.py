"""What of mlxlora a plugin imports: by its source, so that what a function imports counts too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from mlxlora_core.plugins import Plugin
from mlxlora_core.plugins.targets import package_spec

#: what a plugin may import of mlxlora; its tests may import ``testing`` too
DOORS = ("mlxlora_core.api", "mlxlora_core.ops", "mlxlora_core.files", "mlxlora_core.chat")
_CORE = "mlxlora_core"


def private_imports(plugin: Plugin) -> list[str]:
    """``FILE:LINE imports MODULE`` for each import of something of mlxlora that is not public."""
    return [
        f"{path.name}:{line} imports {module}"
        for path in _sources(plugin)
        for line, module in _imports(path)
        if module.partition(".")[0] == _CORE and module not in DOORS
    ]


def _sources(plugin: Plugin) -> Iterator[Path]:
    """The modules of a plugin, without its tests."""
    spec = package_spec(plugin)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        below = (path.relative_to(place) for path in sorted(Path(place).rglob("*.py")))
        yield from (Path(place) / path for path in below if "tests" not in path.parts)
    if spec is not None and not spec.submodule_search_locations and spec.origin:
        yield Path(spec.origin)


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the module of every import in a file; none where it cannot be read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == _CORE:
            yield from ((node.lineno, f"{_CORE}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
