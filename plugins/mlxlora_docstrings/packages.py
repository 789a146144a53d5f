"""Reads packages side by side, each in a child process, and makes rows of what comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import mlxlora_core.api
import mlxlora_docstrings
from mlxlora_core.api import DataError, Row, Rows, Skipped
from mlxlora_docstrings import DocstringOptions
from mlxlora_docstrings.normalise import normalise
from mlxlora_docstrings.versions import versions

#: So many modules of a package may end or hang the process that reads it.
RESTARTS = 8

# How many items a record of a child has -> what it begins with.
_LENGTHS = {1: ("done",), 3: ("at", "row", "skip")}
_POLL_SECONDS = 0.05
_TOLD = 5  # reasons in an error message
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
# What a child needs of the environment to find an interpreter's libraries.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
_START = (
    "import json, sys; request = json.load(open(sys.argv[1], encoding='utf-8'));"
    "sys.path[:] = request.pop('sys_path');"
    "from mlxlora_docstrings.child import main; main(request)"
)


@dataclass(frozen=True)
class Reading:
    """What became of one package: (path, docstring) of its objects, and what was left out."""

    documented: tuple[tuple[str, str], ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Attempt:
    """What one child process left behind.

    Attributes:
        records: the lines it wrote, as :mod:`mlxlora_docstrings.findings` describes them.
        death: how it ended before it was done, or nothing.
        place: the module or class that it worked on last, or nothing.
        stuck: whether that place is to blame, and not the package as a whole.
    """

    records: list[list[Any]]
    death: str
    place: str
    stuck: bool


def build_rows(options: DocstringOptions) -> Rows:
    """Question and answer rows of all packages, sorted by path.

    Raises:
        DataError: no package gave a row.
    """
    packages = sorted(set(options.packages))
    readings = _read_all(packages, options)
    skipped = {skip for reading in readings for skip in reading.skipped}
    rows: dict[str, Row] = {}
    for path, doc in sorted(pair for reading in readings for pair in reading.documented):
        text = normalise(doc) if options.preprocess else doc
        if text:
            rows[path] = make_row(path, text)
        else:
            skipped.add(Skipped(path, "nothing is left of its docstring after preprocessing"))
    ordered = sorted(skipped, key=lambda skip: _weight(skip, packages))
    if not rows:
        told = "; ".join(f"{skip.source}: {skip.reason}" for skip in ordered[:_TOLD])
        raise DataError(
            f"no docstring was found ({told or 'there is none'})", fix="name packages that are installed"
        )
    return Rows(list(rows.values()), ordered, versions(packages))


def _weight(skip: Skipped, packages: list[str]) -> tuple[bool, bool, str, str]:
    """Sorts what was lost by how much it is: packages, then modules, then single docstrings."""
    return skip.source not in packages, "its docstring" in skip.reason, skip.source, skip.reason


def make_row(path: str, doc: str) -> Row:
    """The row that asks what the last part of ``path`` is; rows of one docstring are one group.

    >>> make_row("mlx.nn.relu", "Rectifies.").content["text"]
    'Q: What is relu in mlx?\\nA: mlx.nn.relu Rectifies.'
    """
    name, package = path.rpartition(".")[2], path.partition(".")[0]
    return Row({"text": f"Q: What is {name} in {package}?\nA: {path} {doc}"}, group=doc)


def read_package(package: str, options: DocstringOptions, stop: Event) -> Reading:
    """Read one package; a place that ends or hangs the child is left out of the next attempt.

    Args:
        package: what import takes.
        options: mode, seq_limit and time_limit are used.
        stop: set by another thread to give up at once.
    """
    if not _NAME.fullmatch(package):
        return _nothing(package, "it is no name that import takes (the distribution's may be another)")
    deadly: dict[str, str] = {}
    while not stop.is_set():
        attempt = _attempt(package, options, sorted(deadly), stop)
        if not attempt.death:
            return _reading(package, attempt.records, deadly)
        if attempt.place in ("", package):
            return _nothing(package, attempt.death)
        if not attempt.stuck or attempt.place in deadly or len(deadly) == RESTARTS:
            after = f", after {len(deadly)} others that it was kept out of" if deadly else ""
            return _nothing(package, f"{attempt.death} in {attempt.place}{after}")
        deadly[attempt.place] = attempt.death
    return _nothing(package, "interrupted")


def _reading(package: str, records: list[Any], deadly: dict[str, str]) -> Reading:
    """What the records of a child that lived to the end say."""
    documented = tuple((record[1], record[2]) for record in records if record[0] == "row")
    skipped = [Skipped(place, death) for place, death in deadly.items()]
    skipped += [Skipped(record[1], record[2]) for record in records if record[0] == "skip"]
    if not documented and not skipped:
        return _nothing(package, "it has no docstring")
    return Reading(documented, tuple(skipped))


def _nothing(package: str, reason: str) -> Reading:
    return Reading((), (Skipped(package, reason),))


def _read_all(packages: list[str], options: DocstringOptions) -> list[Reading]:
    stop = Event()
    with ThreadPoolExecutor(options.workers or _cpus()) as pool:
        try:
            return list(pool.map(lambda package: read_package(package, options, stop), packages))
        except BaseException:
            stop.set()  # the children end now, and not at their time limit
            pool.shutdown(cancel_futures=True)
            raise


def _attempt(package: str, options: DocstringOptions, skip: list[str], stop: Event) -> _Attempt:
    """Run one child process to its end, in a temporary folder of its own."""
    with tempfile.TemporaryDirectory(prefix="mlxlora-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        (folder / "home").mkdir()
        request = {
            "package": package,
            "mode": options.mode,
            "skip": skip,
            "seq_limit": options.seq_limit,
            "time_limit": options.time_limit,
            "folder": str(folder),
            "out": str(folder / "findings.jsonl"),
            "sys_path": _search_path(),
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        death, timed_out = _run(folder, options.time_limit, stop)
        records = list(_records(folder / "findings.jsonl"))
    if records and records[-1][0] == "done":
        return _Attempt(records, "", "", False)
    place, since = next(((r[1], float(r[2])) for r in reversed(records) if r[0] == "at"), ("", 0.0))
    # One place that took most of the time hangs; otherwise there was too much to read.
    return _Attempt(records, death, place, not timed_out or since < options.time_limit / 2)


def _run(folder: Path, time_limit: float, stop: Event) -> tuple[str, bool]:
    """Run the child that ``folder`` has a request for; return how it ended and whether by the limit.

    It has an environment, a home and a session of its own, reads nothing and
    prints nowhere; at the end, whatever it started is ended with it.
    """
    process = subprocess.Popen(
        # Not -I: that would also ignore PYTHONHASHSEED, and sets would print in any order.
        [sys.executable, "-P", "-s", "-W", "ignore", "-c", _START, str(folder / "request.json")],
        cwd=folder / "home",
        env=_environment(folder / "home"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + time_limit
    try:
        while not stop.is_set() and time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                return _ending(process.wait(_POLL_SECONDS)), False
        return f"no answer within {time_limit:g} s (option time_limit)", True
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended the process with exit status {status}"
    try:
        return f"died with {signal.Signals(-status).name}"
    except ValueError:
        return f"died with signal {-status}"


def _records(file: Path) -> Iterator[list[Any]]:
    """The lines that a child wrote; the last may be torn, and a package may have written to any file."""
    with suppress(FileNotFoundError), open(file, "rb") as lines:
        for line in lines:
            with suppress(ValueError):
                record = json.loads(line)
                if (
                    isinstance(record, list)
                    and len(record) in _LENGTHS
                    and record[0] in _LENGTHS[len(record)]
                ):
                    yield record


def _environment(home: Path) -> dict[str, str]:
    """The variables of a child: none of the user's own, and nothing that differs from run to run."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    folders = dict.fromkeys(("HOME", "TMPDIR", "TMP", "TEMP"), str(home))
    fixed = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    return kept | folders | fixed


def _search_path() -> list[str]:
    """Where this process imports from, without its working folder, which may hold anything."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    here = os.getcwd()
    first = [] if sys.path and sys.path[0] == here and here not in named else sys.path[:1]
    paths = [os.path.abspath(path) for path in (*first, *sys.path[1:]) if path]
    ours = [str(Path(module.__file__ or "").parents[1]) for module in (mlxlora_core.api, mlxlora_docstrings)]
    return list(dict.fromkeys([*paths, *ours]))


def _cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
