"""A run as it grows, read from its folder by whoever watches it: what is new since the last look.

Nothing is kept between two looks but a cursor, which the watcher brings along. So any
number of processes may look, and none is in the way of the run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlxlora_core.errors import DataError, MlxloraError
from mlxlora_core.files.documents import parse_json
from mlxlora_core.files.forms import UNSOUND, Table, Text, Whole, sound
from mlxlora_core.files.input_file import open_regular
from mlxlora_core.files.row_messages import RowFault
from mlxlora_core.files.row_shapes import read_row
from mlxlora_core.runs.folder import DATA, METRICS, RECORD, SAMPLES, file_stat
from mlxlora_core.runs.listed import ListedRun, listed, marked, state_of, told_by
from mlxlora_core.runs.report.curves import Curves, thinned
from mlxlora_core.runs.report.facts import Facts, read_facts
from mlxlora_core.training.metrics import REPORT_FORM

_NEW_BYTES = 1 << 20  # of a log that are read at a look; a second writes a few hundred
_SAMPLE_BYTES = 4 << 20
_SAMPLES = 200
_ROWS, _ROW_BYTES, _TEXT_LETTERS = 6, 1 << 16, 2000
_BESIDE = 40  # runs
_SHARE = 200  # so many times as long as reading took, nothing is read again
_SAMPLE_FORM = Table({"kind": Text(("sample",)), "step": Whole(), "prompt": Text(), "text": Text()})


class Reading:
    """What is in a run folder, read again when it is asked for, but not for more than a small share of time.

    A log may have a million lines, and a page asks each second; what is new of the log it gets
    at once all the same, see :func:`look`.

    Args:
        folder: of the run.

    Attributes:
        log: which log was read, by its number in the file system, and how long it was before: what was
            written while it was read is told twice rather than never.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = _log(folder)
        self._read: tuple[Facts, ListedRun] | None = None
        self._due, self._stat = 0.0, file_stat(folder / RECORD)

    def told(self) -> tuple[Facts, ListedRun]:
        """What was read last, which is not old, and the run by it, as it stands now.

        Raises:
            DataError: it is no run folder.
        """
        began, stat, log = time.monotonic(), file_stat(self.folder / RECORD), _log(self.folder)
        is_other = log[0] != self.log[0] or log[1] < self.log[1]  # a training that goes on cuts its log
        # The record changes when a stage is begun or done.
        if self._read is None or began >= self._due or stat != self._stat or is_other:
            self._stat, self.log = stat, log
            facts = read_facts(self.folder)
            self._read = facts, told_by(self.folder, facts)
            now = time.monotonic()
            self._due = now + _SHARE * (now - began)
        facts, run = self._read
        state, fault = state_of(self.folder, facts)
        return facts, replace(run, state=state, fault=fault)


def look(reading: Reading, cursor: str = "") -> dict[str, Any]:
    """What a page needs to show a run.

    Args:
        reading: of its folder.
        cursor: as an earlier look has given it; nothing for all that there is.

    Returns:
        ``run`` (as :class:`~mlxlora_core.runs.listed.ListedRun`), ``reports`` that are new,
        ``cursor``, ``anew`` (whether they are all that there are), ``stage`` and ``stages``.

    Raises:
        DataError: it is no run folder.
    """
    facts, run = reading.told()
    folder = reading.folder
    reports, cursor, anew = _reports(folder / METRICS, facts, reading.log, cursor)
    stages = list(facts.record["inputs"])
    open_stages = [stage for stage in stages if stage not in facts.results]
    return {
        "run": {**asdict(run), "path": folder.resolve().name, "settings": {}},
        "reports": reports,
        "cursor": cursor,
        "anew": anew,
        "stages": stages,
        "stage": open_stages[0] if open_stages else None,
    }


def samples(folder: Path) -> list[dict[str, Any]]:
    """What the model was asked and has said: before, on the way, and after; ``step`` is a step or a stage."""
    facts = read_facts(folder)
    told: list[dict[str, Any]] = []
    for stage in ("before", "after"):
        for answer in facts.results.get(stage, {"answers": []})["answers"]:
            said = {"step": stage, "prompt": answer["prompt"], "text": answer["text"]}
            told.append({**said, "expected": answer["expected"]})
    lines = [sample for line in _tail(folder / SAMPLES, _SAMPLE_BYTES) if (sample := _sample(line))]
    return told + lines[-_SAMPLES:]


def rows(folder: Path) -> list[list[dict[str, Any]]]:
    """Some training rows, each as its parts: ``role``, ``text``, and whether it ``counts`` in the loss."""
    facts = read_facts(folder)
    mask = bool(facts.recipe.get("train", {}).get("mask_prompt", False))
    found = []
    try:
        with open_regular(folder / DATA / "train.jsonl", DataError) as file:
            for line in (file.readline(_ROW_BYTES) for _ in range(_ROWS)):
                if line.endswith(b"\n"):
                    found.append(_parts(read_row(json.loads(line)).content, mask))
    except (MlxloraError, OSError, ValueError, RecursionError, RowFault):
        pass  # rows that cannot be shown are told of elsewhere
    return found


def beside(folder: Path) -> list[dict[str, Any]]:
    """The run and those in the same folder, with the settings that differ."""
    here = folder.resolve()
    try:
        names = sorted(path.name for path in here.parent.iterdir() if (path / RECORD).is_file())
    except OSError:
        names = []
    names = [here.name, *(name for name in names if name != here.name)][:_BESIDE]
    return [_as_told(run) for run in marked([listed(here.parent / name) for name in names])]


def curves(folder: Path, name: str) -> dict[str, Any]:
    """The curves of the run, or of one that stands beside it.

    Raises:
        DataError: there is no such run beside it.
    """
    here = folder.resolve()
    if name not in {run["path"] for run in beside(folder)}:
        raise DataError("no such run stands beside this one", where=name)
    return _drawn(read_facts(here.parent / name).curves)


def _as_told(run: ListedRun) -> dict[str, Any]:
    return {**asdict(run), "path": run.path.name, "settings": {}}


def _drawn(found: Curves) -> dict[str, Any]:
    return {"train": list(thinned(found.train)), "valid": list(thinned(found.valid, ("loss",)))}


def _log(folder: Path) -> tuple[int, int]:
    """The number of the log in the file system, and its bytes; 0 for no log."""
    try:
        stat = (folder / METRICS).stat()
    except OSError:
        return 0, 0
    return stat.st_ino, stat.st_size


def _reports(
    path: Path, facts: Facts, read: tuple[int, int], cursor: str
) -> tuple[list[dict[str, Any]], str, bool]:
    """Reports behind a cursor, the cursor behind them, and whether they are all.

    Args:
        path: of the log.
        facts: with all reports of the log.
        read: which log they are of, and how long it was, as of :class:`Reading`.
        cursor: of an earlier look.
    """
    number, size = _log(path.parent)
    file, _, place = cursor.partition(":")
    offset = int(place) if place.isascii() and place.isdecimal() and len(place) < 19 else -1
    if file == str(number) and 0 <= offset <= size <= offset + _NEW_BYTES:
        lines, length = _whole_lines(path, offset, _NEW_BYTES)
        return list(_reported(lines)), f"{number}:{offset + length}", False
    number, size = read
    start = max(0, size - _NEW_BYTES)
    _, length = _whole_lines(path, start, size - start)
    drawn = _drawn(facts.curves)
    both = [{"kind": kind, **report} for kind, reports in drawn.items() for report in reports]
    return sorted(both, key=lambda report: report["step"]), f"{number}:{start + length}", True


def _whole_lines(path: Path, offset: int, most: int) -> tuple[list[bytes], int]:
    """The lines of so many bytes from an offset on that are at their end, and their bytes."""
    try:
        with open_regular(path, DataError) as file:
            file.seek(offset)
            data = file.read(most)
    except (DataError, OSError):
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    return whole.splitlines(), len(whole)


def _reported(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            report, _ = sound(REPORT_FORM, parse_json(line, "", DataError))
        except DataError:
            continue
        if report is not UNSOUND and report["loss"] is not None:
            yield dict(report)


def _sample(line: bytes) -> dict[str, Any] | None:
    try:
        sample, _ = sound(_SAMPLE_FORM, parse_json(line, "", DataError))
    except DataError:
        return None
    return None if sample is UNSOUND else {**sample, "expected": None}


def _tail(path: Path, most: int) -> list[bytes]:
    """The whole lines at the end of a file."""
    try:
        with open_regular(path, DataError) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - most))
            data = file.read(most)
    except (DataError, OSError):
        return []
    lines = data.split(b"\n")[:-1]
    return lines[1:] if size > most else lines


def _parts(content: Mapping[str, Any], mask: bool) -> list[dict[str, Any]]:
    """The parts of a plain row: all of a text counts, and of a question only where it is not masked."""
    if "text" in content:
        found = [("text", content["text"], True)]
    elif "messages" in content:
        found = [
            (m["role"], str(m.get("content") or ""), not mask or m["role"] == "assistant")
            for m in content["messages"]
        ]
    else:
        found = [("prompt", content["prompt"], not mask), ("completion", content["completion"], True)]
    return [{"role": role, "text": text[:_TEXT_LETTERS], "counts": counts} for role, text, counts in found]
