"""What somebody says in a conversation: edited on a terminal, or line by line out of a pipe."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlxlora_core.cli import show, streams
from mlxlora_core.cli.chat_history import HistoryFile, place_of
from mlxlora_core.errors import ResourceError, UsageError, one_line
from mlxlora_core.machine.signals import Interrupted, deferred

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

LINE_BYTES = 16 << 20  # of a question in a pipe
_DUMB = ("dumb", "unknown")  # terminals whose cursor cannot be moved, such as a shell inside an editor


class Lines(Protocol):
    """Where questions come from.

    Attributes:
        is_terminal: whether somebody sits there.
    """

    is_terminal: bool

    def read(self, prompt: str) -> str:
        """The next one, ``prompt`` shown in front where there is somebody to see it.

        Raises:
            EOFError: there is none any more.
            KeyboardInterrupt: Ctrl-C, where nothing was typed.
        """


def open_lines(history: bool, words: Callable[[], Iterable[str]]) -> Lines:
    """Where questions come from in this process.

    Args:
        history: whether those of a terminal are kept for later.
        words: what Tab completes a line that begins with a slash to.
    """
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        if os.environ.get("TERM", "").lower() in _DUMB:
            return PlainLines()
        return TerminalLines(HistoryFile(place_of(os.environ)) if history else None, words)
    return PipedLines()


class PipedLines:
    """Lines of stdin as they come."""

    is_terminal = False

    def read(self, prompt: str) -> str:
        """The next line.

        Raises:
            EOFError: there is none any more.
            UsageError: stdin cannot be read, or holds a line that is too long or no text.
        """
        if sys.stdin is None:
            raise UsageError("stdin is closed", fix="type questions on a terminal, or pipe them")
        try:
            line = sys.stdin.buffer.readline(LINE_BYTES + 1)
        except OSError as fault:
            raise UsageError(f"stdin cannot be read: {fault.strerror}") from fault
        if not line:
            raise EOFError
        if len(line) > LINE_BYTES:
            raise UsageError(f"a line of stdin holds more than {LINE_BYTES >> 20} MiB", fix="shorten it")
        try:
            return line.decode().rstrip("\r\n")
        except UnicodeDecodeError as fault:
            raise UsageError(f"stdin is not UTF-8: {fault}") from fault


class PlainLines(PipedLines):
    """Lines of a terminal that can do no more than show text."""

    is_terminal = True

    def read(self, prompt: str) -> str:
        """The next line, of which the terminal has seen to what was typed wrong."""
        before = signal.getsignal(signal.SIGINT)
        try:
            if before is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stderr.write(prompt)  # after which Ctrl-C may come at once
            sys.stderr.flush()
            return super().read(prompt)
        except (KeyboardInterrupt, EOFError):
            show.progress("")
            raise
        finally:
            signal.signal(signal.SIGINT, before)


class TerminalLines:
    """Lines that are edited on the terminal of stderr, with those of before.

    Args:
        file: where they are kept, or None.
        words: what Tab completes a line that begins with a slash to.
    """

    is_terminal = True

    def __init__(self, file: HistoryFile | None, words: Callable[[], Iterable[str]]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.output.defaults import create_output

        self._file = file
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(self._kept()),
            # Beside the streams of this process, in which control characters are made visible.
            output=create_output(streams.terminal()),
            key_bindings=_keys(),
            completer=_completer(words),
            complete_while_typing=False,
            enable_suspend=True,
        )

    def read(self, prompt: str) -> str:
        """A line, or several that were pasted or joined by Alt-Enter.

        Raises:
            UsageError: the terminal sends another encoding.
        """
        with deferred() as pending:
            text = self._session.prompt(prompt, pre_run=self._watch)
        if pending.signum not in (None, signal.SIGINT):
            raise Interrupted(pending.signum)
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError("what was typed is not UTF-8", fix="set the terminal and its locale to UTF-8")
        if text.strip() and self._file is not None:
            try:
                self._file.add(text)
            except (OSError, ResourceError) as fault:
                self._give_up(fault)
        return text

    def _watch(self) -> None:
        """Let a signal end the editing from inside: an exception of a handler would be lost in its loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._end, number)

    def _end(self, number: int) -> None:
        app = self._session.app
        if app.future is not None and not app.future.done():
            app.exit(exception=Interrupted(number))

    def _kept(self) -> Sequence[str]:
        try:
            return self._file.load() if self._file is not None else ()
        except (OSError, ResourceError) as fault:
            self._give_up(fault)
            return ()

    def _give_up(self, fault: OSError | ResourceError) -> None:
        show.warning(f"no history is kept: {one_line(fault)}")
        self._file = None


def _keys() -> KeyBindings:
    """Further keys: Alt-Enter is a new line, and Ctrl-C takes back what was typed."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def take_back(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


def _completer(words: Callable[[], Iterable[str]]) -> Any:
    """Completes commands."""
    from prompt_toolkit.completion import Completer, Completion

    class Commands(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Completion]:
            before = document.text_before_cursor
            fitting = (word for word in words() if before.startswith("/") and word.startswith(before))
            return [Completion(word, -len(before)) for word in fitting]

    return Commands()
