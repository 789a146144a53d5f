"""Keeps this process, and every Python that it starts, from importing modules of the working folder.

Only what every Python has loaded when it begins is imported here, for until
:func:`forget_working_folder` is called it would be looked for there.
"""

import os
import sys


def safe_python(*arguments: str) -> list[str]:
    """The command that runs this Python with ``arguments``; to be started in :func:`safe_environment`."""
    return [sys.executable, "-P", *arguments]


def safe_environment() -> dict[str, str]:
    """The variables of this process, without what would let a child look for modules where it stands."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, _entries())), "PYTHONSAFEPATH": "1"}


def forget_working_folder() -> None:
    """Look for no module in the working folder where only an empty entry of ``PYTHONPATH`` stands for it."""
    entries = _entries()
    try:
        here = os.getcwd()
    except OSError:  # it is gone
        return
    if "" in entries and here not in map(os.path.abspath, filter(None, entries)):
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]


def _entries() -> list[str]:
    """Those of ``PYTHONPATH``, of which Python takes an empty one for the working folder.

    ``PYTHONPATH=$PYTHONPATH:folder`` leaves one where there was none before.
    """
    path = os.environ.get("PYTHONPATH", "")
    return path.split(os.pathsep) if path else []
