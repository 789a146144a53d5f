"""What a run of the tests leaves in the working tree: nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path


def untracked(folder: Path) -> set[str] | None:
    """The files below a folder that git neither has nor ignores, or None where it is no checkout."""
    command = ["git", "-C", str(folder), "status", "--porcelain", "-z", "--untracked-files=all", "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    entries = done.stdout.decode("utf-8", "surrogateescape").split("\0")
    return {entry[3:] for entry in entries if entry.startswith("?? ")}
