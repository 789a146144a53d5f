"""Temporary names: what a process is still making, and what it left behind when it was killed.

A temporary name is ``.NAME.PROCESS-PROOF.ENDING`` beside its target. The proof is a digest of the
rest, so that a file of somebody else which happens to be called alike is never taken for one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

#: endings of what is not the target yet, is to be put back if its successor fails, and is to go
NEW, OLD, GONE = "tmp", "old", "gone"


def beside(target: Path, ending: str) -> Path:
    """This process's own temporary name beside ``target``."""
    return target.with_name(temporary_name(target.name, os.getpid(), ending))


def temporary_name(name: str, process: int, ending: str) -> str:
    """The temporary name that a process uses for a target called ``name``."""
    told = f"mlxlora {process} {name}".encode("utf-8", "surrogateescape")
    return f".{name}.{process}-{hashlib.sha256(told).hexdigest()[:16]}.{ending}"


def clear_leftovers(folder: Path, names: str) -> int:
    """Remove what processes that are dead left in ``folder`` of targets like ``names``, a glob pattern.

    One that died between taking an old folder away and putting the new one
    there has its old folder put back.

    Returns:
        How many files and folders are gone or put back.
    """
    cleared = 0
    for path in sorted(folder.glob(f".{names}.*.*")):
        name, owner, ending = path.name[1:].rsplit(".", 2)
        process = owner.partition("-")[0]
        if ending not in (NEW, OLD, GONE) or not (process.isascii() and process.isdecimal()):
            continue
        if path.name != temporary_name(name, int(process), ending) or _alive(int(process)):
            continue
        target = folder / name
        if ending == OLD and not target.exists():
            os.replace(path, target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        cleared += 1
    return cleared


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # what is under this process's name now was left by a namesake
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
