"""Reads packages side by side, each in a child process, and makes rows of what comes back."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

from mlxlora_core.api import DataError, Row, Rows, Skipped, report_progress
from mlxlora_docstrings import DocstringOptions
from mlxlora_docstrings.attempt import Attempt, attempt
from mlxlora_docstrings.normalise import normalise
from mlxlora_docstrings.versions import versions

#: So many modules of a package may end or hang the process that reads it.
RESTARTS = 8

_TOLD = 5  # reasons in an error message
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Reading:
    """What became of one package: (path, docstring) of its objects, and what was left out."""

    documented: tuple[tuple[str, str], ...]
    skipped: tuple[Skipped, ...]


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
            rows[path] = make_row(path, text, options.rows)
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


def make_row(path: str, doc: str, form: str = "text") -> Row:
    """The row that asks what the last part of ``path`` is; rows of one docstring are one group.

    >>> make_row("mlx.nn.relu", "Rectifies.").content["text"]
    'Q: What is relu in mlx?\\nA: mlx.nn.relu Rectifies.'
    >>> make_row("mlx.nn.relu", "Rectifies.", "messages").content["messages"][1]["content"]
    'mlx.nn.relu: Rectifies.'
    """
    question = f"What is {path.rpartition('.')[2]} in {path.partition('.')[0]}?"
    if form == "messages":
        said = {"user": question, "assistant": f"{path}: {doc}"}
        return Row({"messages": [{"role": role, "content": text} for role, text in said.items()]}, group=doc)
    asked, answer = f"Q: {question}\nA:", f" {path} {doc}"
    content = {"prompt": asked, "completion": answer} if form == "prompt" else {"text": asked + answer}
    return Row(content, group=doc)


def read_package(package: str, options: DocstringOptions, stop: Event) -> Reading:
    """Read one package; a place that ends or hangs the child is left out of the next attempt.

    Args:
        package: what import takes.
        options: mode, seq_limit and time_limit are used; the limit is for all attempts together.
        stop: set by another thread to give up at once.
    """
    if not _NAME.fullmatch(package):
        return _nothing(package, "it is no name that import takes (the distribution's may be another)")
    deadline = time.monotonic() + options.time_limit
    deadly: dict[str, str] = {}
    while not stop.is_set():
        made = attempt(package, options, sorted(deadly), deadline, stop)
        if not made.death:
            return _reading(made, deadly)
        if made.place in ("", package):
            return _nothing(package, made.death)
        if not made.stuck or made.place in deadly or len(deadly) == RESTARTS:
            after = f", after {len(deadly)} others that it was kept out of" if deadly else ""
            return _nothing(package, f"{made.death} in {made.place}{after}")
        deadly[made.place] = made.death
    return _nothing(package, "interrupted")


def _reading(made: Attempt, deadly: dict[str, str]) -> Reading:
    """What a child that lived to the end has told."""
    skipped = {Skipped(source, reason) for source, reason in (made.skipped | deadly).items()}
    if not made.documented and not skipped:
        return _nothing(made.package, "it has no docstring")
    return Reading(tuple(made.documented.items()), tuple(skipped))


def _nothing(package: str, reason: str) -> Reading:
    return Reading((), (Skipped(package, reason),))


def _read_all(packages: list[str], options: DocstringOptions) -> list[Reading]:
    stop = Event()
    with ThreadPoolExecutor(options.workers or _cpus()) as pool:
        try:
            readings = []
            for reading in pool.map(lambda package: read_package(package, options, stop), packages):
                readings.append(reading)
                report_progress("reading packages", len(readings), len(packages))
            return readings
        except BaseException:
            stop.set()  # the children end now, and not at their time limit
            pool.shutdown(cancel_futures=True)
            raise


def _cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
