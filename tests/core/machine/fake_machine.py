"""A machine as control groups see it, laid down in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def machine(folder: Path, membership: str, files: Mapping[str, str]) -> Path:
    """A root with /proc/self/cgroup and these files below /sys/fs/cgroup."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder
