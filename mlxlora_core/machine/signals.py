"""Signals: the first one ends the work cleanly, a second one at once.

The order of things is that of an orderly shell program: SIGINT, SIGTERM and
SIGHUP end a run with 130, 143 and 129. One that was ignored when the process
began, as ``nohup`` and a shell's background jobs do, stays ignored.

This module is imported before all others, so that it is tiny.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager

TYPE_CHECKING = False  # typing itself takes longer to import than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any

    Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None

_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


_changes = 0


class Interrupted(BaseException):
    """A signal ended the work; no ``except Exception`` takes it for a fault.

    Args:
        signum: which signal.
        what: what the command line says, with what the user can do now.
    """

    def __init__(self, signum: int, what: str = "interrupted") -> None:
        self.signum = int(signum)
        super().__init__(what)

    @property
    def exit_code(self) -> int:
        """128 + n, as shells have it."""
        return 128 + self.signum


class Pending:
    """Whether a signal has come; ``signum`` is None until then."""

    signum: int | None = None


def install() -> None:
    """Let the first signal raise :class:`Interrupted` in the main thread, and a second one end the process.

    Call it in the main thread.
    """
    _handle(_raise)


def uninstall() -> None:
    """From here on a signal just ends the process: there is nothing left to put in order."""
    _handle(signal.SIG_DFL)


@contextmanager
def deferred() -> Iterator[Pending]:
    """Let the first signal wait: it is noted in the value of this block, which looks when it suits.

    A second signal does at once what it did before the block, and after
    :func:`install` ends the process. When the block is left, handlers are what they
    were. In another thread than the main one nothing is changed and nothing is noted,
    since signals do not come there.
    """
    pending = Pending()
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return

    before = _handlers()
    second = {n: signal.SIG_DFL if handler is _raise else handler for n, handler in before.items()}

    def note(signum: int, _: FrameType | None) -> None:
        _put(second)
        pending.signum = signum

    _handle(note)
    try:
        yield pending
    finally:
        _put(before)


@contextmanager
def noted() -> Iterator[Pending]:
    """Only note SIGINT, however often it comes, for work that checks in its own time and goes on.

    Call it in the main thread. If SIGINT is ignored, it stays so, and is not noted.
    """
    pending = Pending()

    def note(came: int, _: FrameType | None) -> None:
        pending.signum = came

    before = {number: handler for number, handler in _handlers().items() if number == signal.SIGINT}
    _put(dict.fromkeys(before, note))
    try:
        yield pending
    finally:
        _put(before)


@contextmanager
def forwarded(pass_on: Callable[[int], None]) -> Iterator[None]:
    """Call a function with the number of each signal that comes, for work that others do.

    Call it in the main thread. One that is ignored stays so, and is not passed on.
    """
    before = _handlers()
    _handle(lambda signum, _: pass_on(signum))
    try:
        yield
    finally:
        _put(before)


@contextmanager
def kept_back() -> Iterator[None]:
    """Let signals wait until the block ends, and in processes that it starts for :func:`let_in`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_in() -> None:
    """Take the signals that were kept back from this process until it is ready for them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


@contextmanager
def undeferred() -> Iterator[None]:
    """Let a signal end the process at once: where no Python runs, no other handler would be called.

    In another thread than the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _handlers()
    uninstall()
    try:
        yield
    finally:
        _put(before)


def changes() -> int:
    """How often handlers were changed here; other changes are not ours."""
    return _changes


def is_ours(fault: BaseException) -> bool:
    """Whether an exception is a signal's, and not one that somebody has raised by hand."""
    if isinstance(fault, KeyboardInterrupt):
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(fault, Interrupted)


def _raise(signum: int, _: FrameType | None) -> None:
    _handle(signal.SIG_DFL)
    raise Interrupted(signum)


def _handle(handler: Handler) -> None:
    """Give each signal that is not ignored a handler."""
    _put(dict.fromkeys(_handlers(), handler))


def _handlers() -> dict[int, Handler]:
    """The handlers of the signals that are not ignored.

    One that was not set by Python cannot be put back and is left alone.
    """
    held = {signum: signal.getsignal(signum) for signum in _ENDING}
    return {signum: handler for signum, handler in held.items() if handler not in (signal.SIG_IGN, None)}


def _put(handlers: dict[int, Handler]) -> None:
    global _changes
    _changes += 1
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
