"""What was typed: the recipe that a name stands for, and the command that goes on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from mlxlora_core.errors import UsageError, listing, nearest
from mlxlora_core.registry import Registry


def find_recipe(name: str, registry: Registry) -> Path:
    """The recipe file that a path or a name stands for.

    Raises:
        UsageError: no plugin brings a recipe of that name.
        PluginError: two plugins do.
    """
    path = Path(name)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    known = [component.spec.name for component in registry.of("recipe")]
    if name in known or ":" in name:
        shipped: Path = registry.find("recipe", name).spec.path
        return shipped
    raise UsageError(
        f"no recipe '{name}' ({nearest(name, known)}there is {listing(known)}, or name a .toml file)"
    )


def resume_command(*, resume: bool) -> str:
    """The command line that was given, ready to be given again to go on."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    return shlex.join(["mlxlora", *arguments, *(["--resume"] if resume else [])])
