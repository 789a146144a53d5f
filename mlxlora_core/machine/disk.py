"""Disk space: how much the work will need, and how much is free."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlxlora_core.errors import ResourceError
from mlxlora_core.machine.limits import readable_bytes


def require_disk(need: int, target: Path) -> str:
    """What ``target`` needs on its disk and what is free there, in words.

    Args:
        need: bytes.
        target: file or folder that is to be written.

    Raises:
        ResourceError: less is free.
    """
    there = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if need > free:
        raise ResourceError(
            f"{readable_bytes(need)} of disk are needed, {readable_bytes(free)} are free",
            where=target,
            fix="free some space, or name a place on another disk",
        )
    return f"{target} needs {readable_bytes(need)} of disk, {readable_bytes(free)} are free"
