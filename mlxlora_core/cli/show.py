"""How results and progress look: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from mlxlora_core.cli import streams
from mlxlora_core.errors import one_line
from mlxlora_core.plugins import Plugin
from mlxlora_core.training.events import (
    CheckpointSaved,
    Note,
    Report,
    TrainEvent,
    TrainingStarted,
    TrainResult,
)


def result(text: object = "", end: str = "\n") -> None:
    """Print a result on stdout, a line unless ``end`` says otherwise; a terminal gets it at once."""
    stream = streams.results()
    stream.write(f"{text}{end}")
    if stream.isatty() or not end:
        stream.flush()


def as_json(value: Any) -> None:
    """Print one JSON document on stdout; what is no letter, or has no place in the encoding, is escaped."""
    encoding = getattr(streams.results(), "encoding", None) or "utf-8"
    document = json.dumps(value, indent=2, ensure_ascii=not encoding.lower().startswith("utf"))
    result("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in document))


def changes(rows: Iterable[tuple[str, str, str]]) -> None:
    """Print a table of settings that differ on stderr."""
    cells = [("setting", "begun with", "now"), *((one_line(a), one_line(b), one_line(c)) for a, b, c in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    for row in cells:
        progress("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def progress(line: str) -> None:
    """Print one line of progress on stderr, control characters made visible."""
    sys.stderr.write(f"{streams.visible(line)}\n")
    sys.stderr.flush()


def warning(text: str) -> None:
    """Print a warning on stderr, on one line."""
    progress(f"mlxlora: warning: {one_line(text)}")


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a plain table on stdout, columns as wide as their longest cell."""
    cells = [list(headings), *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    for row in cells:
        result("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def plugin(found: Plugin) -> dict[str, object]:
    """One plugin as --json shows it."""
    return {
        "name": found.name,
        "distribution": found.distribution,
        "version": found.version,
        "origin": found.origin,
        "value": found.value,
        "status": found.status,
        "reason": found.reason,
        "components": [{"kind": kind, "name": name} for kind, name in found.components],
    }


def report(line: Report | CheckpointSaved, steps: int) -> str:
    """One report of training as a line."""
    return f"step {line.step:>{len(str(steps))}}/{steps}  {line.words}"


@contextmanager
def tensors(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, all), which moves a bar where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=streams.terminal())
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, count: bar.update(task, completed=done, total=count)


@contextmanager
def training() -> Iterator[Callable[[TrainEvent], None]]:
    """A function that shows each event of a training, over a bar where stderr is a terminal."""
    with ExitStack() as bar:
        display: Callable[[Report | CheckpointSaved], None] | None = None

        def show(event: TrainEvent) -> None:
            nonlocal display
            if isinstance(event, Note):
                progress(event.text)
            elif isinstance(event, TrainingStarted):
                display = bar.enter_context(_bar(event))
            elif isinstance(event, TrainResult):
                bar.close()
            elif display is not None:
                display(event)

        yield show


@contextmanager
def _bar(begin: TrainingStarted) -> Iterator[Callable[[Report | CheckpointSaved], None]]:
    """A function that shows each report it is given, over a bar where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=streams.terminal(), highlight=False, soft_wrap=True)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=begin.steps, completed=begin.step)

        def show(line: Report | CheckpointSaved) -> None:
            console.print(report(line, begin.steps), markup=False)
            bar.update(task, completed=line.step)

        yield show
