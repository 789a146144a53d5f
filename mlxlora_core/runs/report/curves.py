"""The curves of a report: read from ``metrics.jsonl`` line by line, and thinned to what a page can show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.errors import DataError
from mlxlora_core.files.documents import parse_json
from mlxlora_core.files.forms import UNSOUND, sound
from mlxlora_core.files.input_file import open_regular
from mlxlora_core.training.metrics import COUNTS, FIGURES, REPORT_FORM, TIMES

Reports = Sequence[Mapping[str, Any]]

POINTS = 2000  # of a curve that is drawn, about

_LINE_BYTES = 1 << 16  # a report has a few hundred
_LOG_BYTES = 256 << 20  # a million reports
_CURVES = ("loss", *FIGURES)
_KEPT = ("step", *_CURVES, *TIMES, *COUNTS)


@dataclass(frozen=True)
class Curves:
    """What a log has to draw.

    Attributes:
        train: reports of training in the order of their steps; only finite numbers.
        valid: validations in the order of their steps.
        not_finite: how many of both had a loss that is not finite.
    """

    train: Reports = ()
    valid: Reports = ()
    not_finite: int = 0


def read_curves(path: Path) -> Curves:
    """The reports of training and the validations in a log.

    What is no whole report is passed over: a line that is being written,
    whatever else somebody has put there. Of two reports of one step the later
    counts.

    Raises:
        DataError: it is no regular file, cannot be read, or is longer than any log.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = {"train": {}, "valid": {}}
    not_finite = 0
    for line in _lines(path):
        try:
            report, _ = sound(REPORT_FORM, parse_json(line, path, DataError))
        except DataError:
            continue
        if report is UNSOUND:
            continue
        if report["loss"] is None:
            not_finite += 1
        else:
            found[report["kind"]][report["step"]] = {key: report[key] for key in _KEPT if key in report}
    train, valid = ([steps[step] for step in sorted(steps)] for steps in found.values())
    return Curves(train, valid, not_finite)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a log that are not too long; none of a log that is not there."""
    try:
        path.lstat()
    except OSError:
        return
    read = 0
    with open_regular(path, DataError) as file:
        try:
            while line := file.readline(_LINE_BYTES):
                read += len(line)
                if read > _LOG_BYTES:
                    raise DataError(f"is longer than {_LOG_BYTES >> 20} MiB", where=path)
                yield line
        except OSError as fault:
            raise DataError(f"cannot be read: {fault.strerror}", where=path) from fault


def thinned(reports: Reports, figures: Sequence[str] = _CURVES, points: int = POINTS) -> Reports:
    """At most ``points`` reports of a curve, or a few more, with the extremes of every figure among them.

    Args:
        reports: in the order of their steps.
        figures: of these the extremes are kept.
        points: how many.

    Returns:
        The first and the last report and, of stretches of equal numbers of
        reports, the one that is lowest and the one that is highest in each figure.
    """
    if len(reports) <= points:
        return reports
    kept = {0, len(reports) - 1}
    stretches = max(points // (2 * len(figures)), 1)
    for part in range(stretches):
        here = range(part * len(reports) // stretches, (part + 1) * len(reports) // stretches)
        for figure in figures:
            there = [i for i in here if figure in reports[i]]
            if there:
                kept |= {end(there, key=lambda i: reports[i][figure]) for end in (min, max)}
    return [reports[i] for i in sorted(kept)]
