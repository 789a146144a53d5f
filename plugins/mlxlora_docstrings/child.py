"""What runs in the child process: it bounds what the package may take, and reads it."""

from __future__ import annotations

import math
import os
import signal
from contextlib import suppress
from typing import Any

from mlxlora_docstrings.findings import Findings

_FILE_BYTES = 1 << 30
_MEMORY_BYTES = 8 << 30  # written pages; the largest packages take 3 GB to import
_MORE_PROCESSES = 256  # and threads, beyond those that the user has


def main(request: dict[str, Any]) -> None:
    """Read a package and leave the process at once, whatever the package has set up to run at exit.

    Args:
        request: ``package``, ``mode``, ``skip`` (places to keep out of),
            ``seq_limit``, ``seconds`` that are left, and ``folder``. Standard
            output is where the findings go.
    """
    _contain(request["seconds"])
    with os.fdopen(_keep_output(), "wb") as file:
        findings = Findings(file, request["seq_limit"], request["folder"])
        findings.begin(os.getpid())
        if request["mode"] == "import":
            from mlxlora_docstrings.live import read
        else:
            from mlxlora_docstrings.sources import read
        try:
            read(request["package"], frozenset(request["skip"]), findings)
        except OverflowError as fault:
            findings.skip(request["package"], fault)
        findings.done()
        os._exit(0)


def _keep_output() -> int:
    """A descriptor of standard output that no program inherits; the three standard ones lead nowhere."""
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    return kept


def _contain(seconds: float) -> None:
    """Bound what a package can do to the machine, as far as the system lets us.

    What it starts is bound alike. This stops accidents, and is no wall against
    a package that means harm.

    Args:
        seconds: how long the parent waits.
    """
    with suppress(ImportError):
        import resource

        # No processor spends more than the time limit; the margin lets the parent tell that first.
        processor_seconds = (math.ceil(seconds) + 10) * (os.cpu_count() or 1)
        for limit, value in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, _FILE_BYTES),
            (resource.RLIMIT_DATA, _MEMORY_BYTES),
            (resource.RLIMIT_CPU, processor_seconds),
            (resource.RLIMIT_NPROC, _tasks() + _MORE_PROCESSES),
        ):
            _lower(limit, value)
    # Should memory run out, this process goes first and not the one that started it.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    # The parent ends this process at the limit; the alarm is for when the parent is gone.
    if hasattr(signal, "alarm"):
        signal.alarm(math.ceil(seconds) + 10)


def _lower(limit: int, value: int) -> None:
    """Set a limit of this process, unless a lower one holds."""
    import resource

    with suppress(OSError, ValueError):
        held = [
            value if old == resource.RLIM_INFINITY else min(old, value) for old in resource.getrlimit(limit)
        ]
        resource.setrlimit(limit, (held[0], held[1]))


def _tasks() -> int:
    """How many processes and threads the user has, who is counted as a whole; many where that is unknown."""
    count = 0
    try:
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    count += len(os.listdir(f"/proc/{name}/task"))
    except OSError:
        return 1 << 16
    return count
