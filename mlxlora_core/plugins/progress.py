"""Progress and notes from a plugin at work, passed on to whoever shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: what shows (what, done, count)
Shown = Callable[[str, int, int], None]

_shown: ContextVar[Shown | None] = ContextVar("shown", default=None)
_heard: ContextVar[list[str] | None] = ContextVar("heard", default=None)


def report_progress(what: str, done: int, count: int) -> None:
    """Tell how far the work at hand is; where nobody shows it, nothing happens.

    Args:
        what: the work in a word or two, the same from one call to the next.
        done: how much of it is done.
        count: how much there is.
    """
    if (show := _shown.get()) is not None:
        show(what, done, count)


@contextmanager
def progress_shown(show: Shown) -> Iterator[None]:
    """Have ``show`` called with what :func:`report_progress` is told in this context."""
    before = _shown.set(show)
    try:
        yield
    finally:
        _shown.reset(before)


def report_note(text: str) -> None:
    """Tell what the result of the work at hand does not say by itself, such as what was lost on the way.

    Args:
        text: a sentence without a full stop; where nobody asks for it, nothing happens.
    """
    if (heard := _heard.get()) is not None:
        heard.append(text)


@contextmanager
def notes_heard() -> Iterator[list[str]]:
    """A list to which :func:`report_note` adds what it is told in this context."""
    notes: list[str] = []
    before = _heard.set(notes)
    try:
        yield notes
    finally:
        _heard.reset(before)
