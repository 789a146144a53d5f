"""Which of several libraries is the fastest on this machine, remembered from one process to the next.

Only ``mlxlora doctor`` measures; every other process reads one small file. The result is valid for one
model of processor, one number of threads and unchanged libraries; on any doubt it is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxlora_core.api import MlxloraError
from mlxlora_core.files import read_json, write_json

_MOST_BYTES = 65536


def remembered(libraries: Sequence[str], threads: int) -> str | None:
    """The fastest of ``libraries`` with so many threads, or None if that is not known.

    Args:
        libraries: paths, or names that the dynamic linker finds.
        threads: used by a product.
    """
    file = _file()
    if file is None:
        return None
    with suppress(MlxloraError, OSError, ValueError, AttributeError):
        told = read_json(file, _MOST_BYTES)
        fastest = told.get("fastest")
        if told.get("of") == _state(libraries, threads) and fastest in libraries:
            return str(fastest)
    return None


def remember(fastest: str, libraries: Sequence[str], threads: int) -> None:
    """Remember which of ``libraries`` is the fastest.

    Raises:
        ResourceError: the file cannot be written.
        SafetyError: the path holds something else.
    """
    file = _file()
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"fastest": fastest, "of": _state(libraries, threads)})


def _file() -> Path | None:
    """The file that remembers it, or None if there is no home folder."""
    named, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    root = named if os.path.isabs(named) else os.path.join(home, ".cache")
    return Path(root, "mlxlora", "blas.json") if os.path.isabs(root) else None


def _state(libraries: Sequence[str], threads: int) -> dict[str, Any]:
    """What a measurement is valid for; a library that only the linker finds is identified by its name."""
    return {
        "processor": _processor(),
        "threads": threads,
        "libraries": {path: os.stat(path).st_mtime_ns if os.path.exists(path) else 0 for path in libraries},
    }


def _processor() -> str:
    """The model of the processor. Source: proc(5), ``/proc/cpuinfo``."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file.read(4096).splitlines() if line.startswith("model name")]
        return lines[0].partition(":")[2].strip() if lines else ""
    return ""
