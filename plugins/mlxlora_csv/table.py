"""A table of the reports of a training."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import UsageError
from mlxlora_core.files import append_line, open_regular, write_text

#: events that are a row
REPORTS = ("train", "valid", "spike")
COLUMNS: tuple[str, ...] = (
    "step",
    "kind",
    "loss",
    "learning_rate",
    "grad_norm",
    "steps_per_second",
    "tokens_per_second",
    "trained_tokens",
    "peak_memory_bytes",
    "clipped",
    "skipped",
    "tokens",
    "seconds",
    "median",
    "padding",
)
#: those of a table of before, which goes on so
OLDER = COLUMNS[:-1]


class Table:
    """One .csv file: a row a report, written as it comes.

    A training that goes on from a step goes on in the table too: rows behind
    that step are taken out, since they come again.

    Args:
        path: of the table.

    Raises:
        UsageError: there is such a file, and it is none of these tables.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun, self._columns = False, COLUMNS
        if path.exists():
            heading = _lines(path)[:1]
            if heading == [_line(OLDER)]:
                self._columns = OLDER
            elif heading != [_line(COLUMNS)]:
                raise UsageError(
                    "is no table of this observer and was left alone", where=path, fix="rename it"
                )

    def event(self, event: Mapping[str, Any]) -> None:
        """Write a report; make the table ready where a training begins."""
        if event["kind"] == "training_started":
            self._begin(event["step"])
        elif event["kind"] in REPORTS:
            if not self._begun:
                self._begin(0)
            append_line(self.path, _line(event.get(column, "") for column in self._columns))

    def end(self, how: str) -> None:
        """Every row is in the file already."""

    def _begin(self, step: int) -> None:
        """Leave the heading, and the rows up to ``step``; none at the start."""
        rows = _lines(self.path)[1:] if step and self.path.exists() else []
        kept = [row for row in rows if _step_of(row) <= step]
        write_text(self.path, "".join(f"{row}\n" for row in (_line(self._columns), *kept)))
        self._begun = True


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; a last one that is torn is none."""
    with open_regular(path, UsageError) as file:
        return file.read().decode("utf-8", "replace").split("\n")[:-1]


def _line(cells: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow("" if cell is None else cell for cell in cells)
    return text.getvalue()


def _step_of(row: str) -> float:
    """The step of a row; infinite for one that has none."""
    first = row.partition(",")[0]
    return int(first) if first.isascii() and first.isdecimal() else float("inf")
