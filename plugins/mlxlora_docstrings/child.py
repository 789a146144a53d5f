"""What runs in the child process: it reads one package and writes what it finds to a file.

The file holds one JSON list a line::

    ["at", place, seconds]      work on a module or a class begins, so long after the start
    ["row", path, docstring]
    ["skip", source, reason]
    ["done"]                    the last line, if the child lived to write it
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from contextlib import suppress
from typing import Any, TextIO

from mlxlora_docstrings.graph import is_public_path

# What a process writes of itself: <object at 0x7f3a5c0e1d50>, and anything that may be a pointer.
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{8,}")
_REASON_CHARACTERS = 200
_FILE_BYTES = 1 << 30
_MEMORY_BYTES = 8 << 30  # written pages; the largest packages take 3 GB to import
_MORE_PROCESSES = 256  # and threads, beyond those that the user has


class Findings:
    """Writes what was found; nothing that changes from run to run gets through.

    Args:
        file: where to write.
        seq_limit: longest docstring in characters.
        folder: the temporary folder that the child lives in.
    """

    def __init__(self, file: TextIO, seq_limit: int, folder: str) -> None:
        self._file, self._seq_limit, self._folder = file, seq_limit, folder
        self._docs: set[str] = set()
        self._start = time.monotonic()

    def at(self, place: str) -> None:
        """Work on ``place`` begins: should the process die now, that is the culprit."""
        self._write("at", place, time.monotonic() - self._start)
        self._file.flush()

    def row(self, path: str, doc: str) -> None:
        """One documented object, or why its docstring cannot be used.

        Best paths come first. What has none but a private path and says what a
        public one has said is no news: the C function under a public one, mostly.
        """
        if not is_public_path(path) and doc in self._docs:
            return
        self._docs.add(doc)
        fault = self._fault(doc)
        if fault:
            self._write("skip", path, f"its docstring {fault}")
        else:
            self._write("row", path, doc)

    def skip(self, source: str, fault: BaseException | str) -> None:
        """``source`` was left out because of ``fault``."""
        self._write("skip", source, self._reason(fault))

    def done(self) -> None:
        """Everything was read."""
        self._write("done")
        self._file.flush()

    def _write(self, *record: str | float) -> None:
        self._file.write(json.dumps(record) + "\n")

    def _fault(self, doc: str) -> str:
        if len(doc) > self._seq_limit:
            return f"has {len(doc)} characters, the limit is {self._seq_limit}"
        if _ADDRESS.search(doc):
            return "holds what may be a memory address"
        if self._folder in doc:
            return "holds the path of a temporary folder"
        if any("\ud800" <= letter <= "\udfff" for letter in doc):
            return "holds half a surrogate pair"
        return ""

    def _reason(self, fault: BaseException | str) -> str:
        if isinstance(fault, SystemExit):
            return "it called sys.exit"
        try:
            text = fault if isinstance(fault, str) else f"{type(fault).__name__}: {fault}".rstrip(": ")
        except BaseException:
            text = type(fault).__name__
        text = _ADDRESS.sub("at 0x...", text.replace(self._folder, "<temporary folder>"))
        text = " ".join(text.split())
        return text if len(text) <= _REASON_CHARACTERS else text[: _REASON_CHARACTERS - 3] + "..."


def main(request: dict[str, Any]) -> None:
    """Read a package and leave the process at once, whatever the package has set up to run at exit.

    Args:
        request: ``package``, ``mode``, ``skip`` (places to keep out of),
            ``seq_limit``, ``time_limit``, ``folder`` and ``out``.
    """
    _contain(request["time_limit"])
    with open(request["out"], "w", encoding="ascii") as file:
        findings = Findings(file, request["seq_limit"], request["folder"])
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


def _contain(time_limit: float) -> None:
    """Bound what a package can do to the machine, as far as the system lets us.

    What it starts is bound alike. This stops accidents, and is no wall against
    a package that means harm.
    """
    with suppress(ImportError):
        import resource

        # No processor spends more than the time limit; the margin lets the parent tell that first.
        seconds = (int(time_limit) + 10) * (os.cpu_count() or 1)
        for limit, value in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, _FILE_BYTES),
            (resource.RLIMIT_DATA, _MEMORY_BYTES),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_NPROC, _tasks() + _MORE_PROCESSES),
        ):
            _lower(limit, value)
    # Should memory run out, this process goes first and not the one that started it.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    # The parent ends this process at the limit; the alarm is for when the parent is gone.
    if hasattr(signal, "alarm"):
        signal.alarm(int(time_limit) + 10)


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
