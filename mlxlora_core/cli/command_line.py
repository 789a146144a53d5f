"""The command that was typed, as the one that goes on with it."""

from __future__ import annotations

import shlex
import sys


def resume_command(*, resume: bool) -> str:
    """The command line that was given, ready to be given again to go on."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    return shlex.join(["mlxlora", *arguments, *(["--resume"] if resume else [])])
