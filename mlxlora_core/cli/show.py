"""How results and progress look: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from mlxlora_core.cli import streams
from mlxlora_core.errors import bounded, one_line, short
from mlxlora_core.files.documents import finite
from mlxlora_core.model.events import SpaceNeeded, TensorWritten
from mlxlora_core.plugins import Plugin
from mlxlora_core.training.events import (
    Advanced,
    CheckpointSaved,
    Note,
    Report,
    TrainEvent,
    TrainingStarted,
    TrainResult,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")

_CELL_LETTERS = 300  # of a setting that is told
SECONDS_A_LINE = 30  # between two lines of progress, where there is no terminal

_silent = False  # whether another process shows all of it


@contextmanager
def silence(silent: bool) -> Iterator[None]:
    """Inside, nothing is shown where ``silent``: of processes that do the same, one does."""
    global _silent
    before, _silent = _silent, silent
    try:
        yield
    finally:
        _silent = before


def result(text: object = "", end: str = "\n") -> None:
    """Print a result on stdout, a line unless ``end`` says otherwise; a terminal gets it at once."""
    if _silent:
        return
    stream = streams.results()
    stream.write(f"{text}{end}")
    if stream.isatty() or not end:
        stream.flush()


def as_json(value: Any) -> None:
    """Print one JSON document on stdout.

    A number that is not finite is null beside a word; what is no letter, or has no place in
    the encoding of stdout, is escaped.
    """
    encoding = getattr(streams.results(), "encoding", None) or "utf-8"
    in_ascii = not encoding.lower().startswith("utf")
    document = json.dumps(finite(value), indent=2, ensure_ascii=in_ascii, allow_nan=False)
    result("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in document))


def changes(rows: Iterable[tuple[str, str, str]]) -> None:
    """Print a table of settings that differ on stderr."""
    cells = [
        ("setting", "begun with", "now"),
        *(tuple(one_line(short(cell, _CELL_LETTERS)) for cell in row) for row in rows),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    for row in cells:
        progress("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def progress(line: str) -> None:
    """Print one line of progress on stderr, control characters made visible."""
    if _silent:
        return
    sys.stderr.write(f"{bounded(line)}\n")
    sys.stderr.flush()


def warning(text: str) -> None:
    """Print a warning on stderr, on one line."""
    progress(f"mlxlora: warning: {text}")


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None) -> None:
    """Print a plain table on stdout.

    Args:
        headings: one a column.
        rows: their cells.
        width: columns of text that lines have at most, by breaking the longest cells; None is as many
            as it takes.
    """
    cells = [list(headings), *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    if width is not None:
        _narrow(widths, width - len("  ") * (len(widths) - 1))
        cells = [line for row in cells for line in _broken(row, widths)]
    for row in cells:
        result("  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip())


def _broken(row: Sequence[str], widths: Sequence[int]) -> Iterator[list[str]]:
    """A row as the lines that it needs."""
    parts = [textwrap.wrap(cell, max(wide, 1)) for cell, wide in zip(row, widths, strict=True)]
    yield from (list(line) for line in zip_longest(*parts, fillvalue=""))


def _narrow(widths: list[int], total: int) -> None:
    """Take from the widest columns until all together are at most ``total`` wide."""
    while sum(widths) > total:
        widest = widths.index(max(widths))
        others = max(width for i, width in enumerate(widths) if i != widest)
        widths[widest] -= max(1, min(sum(widths) - total, widths[widest] - others))


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


def to_its_end(work: Generator[Advanced, None, T]) -> T:
    """The value of a piece of work, over a bar that shows how far it is."""
    with Bar() as bar:
        while True:
            try:
                event = next(work)
            except StopIteration as end:
                value: T = end.value
                return value
            bar.move(event.what, event.done, event.count)


def writing(what: str, events: Iterable[SpaceNeeded | TensorWritten | T], report: type[T]) -> T:
    """Show how far the writing of a model is, over a bar; its report, of type ``report``."""
    with Bar() as bar:
        for event in events:
            if isinstance(event, report):
                return event
            if isinstance(event, TensorWritten):
                bar.move(what, event.done, event.count)
            elif isinstance(event, SpaceNeeded):
                progress(event.text)
    raise AssertionError("the report comes last")


def training(bar: Bar) -> Callable[[TrainEvent], None]:
    """A function that shows each event of a training, above and in a bar."""
    steps = 0

    def show(event: TrainEvent) -> None:
        nonlocal steps
        if isinstance(event, Advanced):
            bar.move(event.what, event.done, event.count)
        elif isinstance(event, TrainingStarted):
            steps = event.steps
            bar.move("training", event.step, event.steps)
        elif isinstance(event, Note):
            bar.say(event.text)
        elif not isinstance(event, TrainResult):
            bar.say(report(event, steps))

    return show


class Bar:
    """How far the work at hand is: a bar where stderr is a terminal, else a line now and then.

    A context; the bar is gone when the work or the context is at its end. Lines
    go above it.
    """

    def __enter__(self) -> Bar:
        self._stack, self._what, self._told = ExitStack(), "", 0.0
        self._progress: Progress | None = None
        return self

    def __exit__(self, *fault: object) -> None:
        self._stack.close()

    def say(self, line: str) -> None:
        """Print a line of progress."""
        if self._progress is None:
            progress(line)
        else:
            self._progress.console.print(bounded(line), markup=False)

    def wait(self, what: str) -> None:
        """Show that work goes on of which nobody knows how much there is."""
        self._begin(what, counted=False)

    def move(self, what: str, done: int, count: int) -> None:
        """Show that ``done`` of ``count`` are done of the work called ``what``."""
        if what != self._what:
            self._begin(what, counted=True)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=count)
        elif what != "training" and time.monotonic() - self._told > SECONDS_A_LINE:  # a training reports
            self._told = time.monotonic()
            progress(f"{what}: {done} of {count}")
        if done == count:
            self.end()

    def _begin(self, what: str, *, counted: bool) -> None:
        self.end()
        self._what, self._told = what, time.monotonic()
        if _silent or not sys.stderr.isatty():
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        far = (MofNCompleteColumn(), TimeRemainingColumn(compact=True)) if counted else (TimeElapsedColumn(),)
        title = TextColumn("{task.description}", markup=False)
        # Whatever else is printed goes on through the streams that escape it, not through rich.
        bar = Progress(
            title,
            BarColumn(),
            *far,
            console=_screen(),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._progress = self._stack.enter_context(bar)
        self._task = bar.add_task(streams.visible(what), total=None)

    def end(self) -> None:
        """Take the bar away."""
        self._stack.close()
        self._progress, self._what = None, ""


def _screen() -> Console:
    """stderr, for a bar and the lines above it."""
    from rich.console import Console

    return Console(file=streams.terminal(), highlight=False, soft_wrap=True)
