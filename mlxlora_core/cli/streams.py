"""The standard streams, whatever they are: closed, full, gone, of another encoding, or a terminal.

One place that all output goes through. What cannot be told on stderr is not
told, and the work goes on; a result that cannot be written is an error.
Nothing that was read somewhere moves the cursor of a terminal: control
characters are made visible there, while a pipe gets a result as it is.

This module is imported before almost all others, so that it is tiny.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
from contextlib import contextmanager

TYPE_CHECKING = False  # typing itself takes longer to import than all the rest
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from _typeshed import ReadableBuffer

_ERRORS = "mlxlora"  # the name of how text is written that an encoding does not have
_WAIT_SECONDS = 1  # for room on a stderr that does not block

#: characters that reorder a line, beside the control characters: marks, embeddings, overrides and isolates
_REORDERING = frozenset((0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))

# sys.stdout of before, while what anybody prints goes to stderr.
_results: list[TextIO] = []


def visible(text: str) -> str:
    """``text`` with every character escaped that could move a cursor, ring, reorder a line or forge one.

    Lines and tabs stay, and so does whatever people write, such as joined emoji.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(c) if _is_unsafe(ord(c)) else c for c in text)


def open_streams() -> None:
    """Put streams in the place of ``sys.stdout`` and ``sys.stderr`` that nothing can break.

    Standard streams that are closed are opened to nowhere, lest a file that is
    opened later takes their number and is written over by messages.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    codecs.register_error(_ERRORS, _replaced)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # the streams see to it themselves
    sys.stdout = _text(_Screen if os.isatty(1) else io.TextIOWrapper, _Stdout(1), sys.stdout)
    sys.stderr = _text(_Screen, _Stream(2), sys.stderr)


def terminal() -> TextIO:
    """stderr without the escaping, for a display that writes control sequences of its own."""
    if not isinstance(sys.stderr, _Screen):
        return sys.stderr
    return _text(io.TextIOWrapper, _Stream(2), sys.stderr)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, what anybody prints goes to stderr, and only what is written to :func:`results` to stdout."""
    _results.append(sys.stdout)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = _results.pop()


def results() -> TextIO:
    """Where results are written: stdout."""
    return _results[-1] if _results else sys.stdout


def tell_warning(message: object, *_: object, **__: object) -> None:
    """Print a warning of Python's on stderr, on one line; see :func:`warnings.showwarning`."""
    sys.stderr.write(f"mlxlora: warning: {' '.join(str(message).split())}\n")


class _Stream(io.RawIOBase):
    """stderr: what cannot be written is lost, and nobody is told."""

    def __init__(self, number: int) -> None:
        self._number, self._is_terminal = number, os.isatty(number)
        self._patient = True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return self._is_terminal

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        view = memoryview(data)
        try:
            return os.write(self._number, view)
        except BlockingIOError:
            return 0 if self._has_room() else view.nbytes
        except OSError as fault:
            self._lost(fault)
            return view.nbytes

    def _has_room(self) -> bool:
        """Wait until a stream that does not block takes something; whether it does."""
        if self._patient:
            self._patient = _is_ready(self._number, _WAIT_SECONDS)
        return self._patient

    def _lost(self, fault: OSError) -> None:
        """What there is to do about a fault."""


class _Stdout(_Stream):
    """stdout: the first result that cannot be written raises, unless it was for a terminal that is gone."""

    _gone = False

    def write(self, data: ReadableBuffer) -> int:
        return memoryview(data).nbytes if self._gone else super().write(data)

    def _has_room(self) -> bool:
        return _is_ready(self._number, None)

    def _lost(self, fault: OSError) -> None:
        self._gone = True
        if fault.errno == errno.EPIPE:  # end as any program does whose reader goes away, without a word
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
        if not (self._is_terminal and fault.errno == errno.EIO):
            raise OSError(errno.EIO, f"cannot be written: {fault.strerror}", "stdout") from fault


class _Screen(io.TextIOWrapper):
    """Text for a person to read: control characters are made visible."""

    def write(self, text: str) -> int:
        super().write(visible(text))
        return len(text)


def _text(kind: type[io.TextIOWrapper], raw: _Stream, before: TextIO | None) -> TextIO:
    """A text stream in the encoding of the one before, which no text is too odd for."""
    encoding = getattr(before, "encoding", None) or "utf-8"
    at_once = raw.isatty() or raw.fileno() == 2
    return kind(io.BufferedWriter(raw), encoding, _ERRORS, newline="\n", line_buffering=at_once)


def _replaced(fault: UnicodeError) -> tuple[str | bytes, int]:
    """What is written for what an encoding lacks: bytes of file names as they are, else escapes."""
    assert isinstance(fault, UnicodeEncodeError)
    text = fault.object[fault.start : fault.end]
    if all("\udc80" <= c <= "\udcff" for c in text):
        return bytes(ord(c) - 0xDC00 for c in text), fault.end
    return "".join(map(_escaped, text)), fault.end


def _is_unsafe(code: int) -> bool:
    return (
        (code < 0x20 and code not in (0x09, 0x0A))
        or 0x7F <= code < 0xA0
        or 0xD800 <= code < 0xE000
        or code in _REORDERING
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _is_ready(number: int, seconds: float | None) -> bool:
    """Wait until a descriptor can be written, for at most so long; whether it can."""
    import select

    try:
        return bool(select.select([], [number], [], seconds)[1])
    except (OSError, ValueError):
        return False
