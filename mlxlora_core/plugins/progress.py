"""How far a plugin is with its work, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: what shows (what, done, count)
Shown = Callable[[str, int, int], None]

_shown: ContextVar[Shown | None] = ContextVar("shown", default=None)


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
