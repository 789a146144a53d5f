"""Python in a process of its own that runs no module of the working folder."""

from __future__ import annotations

import os
import sys


def safe_python(*arguments: str) -> list[str]:
    """The command that runs this Python with ``arguments``; to be started in :func:`safe_environment`."""
    return [sys.executable, "-P", *arguments]


def safe_environment() -> dict[str, str]:
    """The variables of this process, without what would let a child look for modules where it stands.

    An empty entry of ``PYTHONPATH``, as ``PYTHONPATH=$PYTHONPATH:folder`` leaves it, is the working folder.
    """
    path = os.pathsep.join(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
