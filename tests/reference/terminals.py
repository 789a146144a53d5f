"""``mlxlora`` on a pseudo-terminal that answers as a real one does, and keys to press."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte

PATIENCE_SECONDS = 30.0
UP, LEFT, HOME, BACKSPACE, ALT_ENTER, TAB = "\x1b[A", "\x1b[D", "\x1b[H", "\x7f", "\x1b\r", "\t"
CTRL_A, CTRL_C, CTRL_D, CTRL_Z = "\x01", "\x03", "\x04", "\x1a"
_READY = "\x1b[?2004h"  # a line is edited from here on: what is pasted will be told apart


class Terminal:
    """A process on a terminal.

    Args:
        arguments: of ``mlxlora``.
        cwd: its working folder.
        shell: what bash does with the command, which stands for ``{}``; nothing where there is no shell.
        variables: of its environment, beside those of the tests.

    Attributes:
        screen: what is on it now.
        written: all that came, control sequences and all.
        echoed: whether the terminal did so itself when the process had ended.
    """

    echoed = False

    def __init__(self, *arguments: object, cwd: Path, shell: str = "", **variables: str) -> None:
        command = [sys.executable, "-m", "mlxlora_core", *map(str, arguments)]
        if shell:
            command = ["bash", "-c", shell.format(shlex.join(command))]
        self._master, slave = pty.openpty()
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.screen, self.written, self._seen = _Screen(80, 24, self._master), "", 0
        self._stream, self._decode = pyte.Stream(self.screen), codecs.getincrementaldecoder("utf-8")().decode
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env={**os.environ, "MLXLORA_PLUGINS": "", "TERM": "xterm-256color", **variables},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def press(self, keys: str) -> None:
        """Type something; it is not shown before the process takes it."""
        self.press_bytes(keys.encode())

    def press_bytes(self, keys: bytes) -> None:
        """Type what may be in any encoding."""
        os.write(self._master, keys)

    def say(self, line: str) -> None:
        """Type a line, and the key that ends it."""
        self.press(line + "\r")

    def paste(self, text: str) -> None:
        """Paste as terminals do that tell of it."""
        self.press(f"\x1b[200~{text}\x1b[201~")

    def resize(self, columns: int, rows: int) -> None:
        """Make the window so large, and tell the process."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)
        os.kill(self.process.pid, signal.SIGWINCH)

    def ready(self) -> str:
        """Wait until the next line is edited; what came before."""
        return self.until(_READY)

    def until(self, text: str) -> str:
        """Wait until ``text`` comes, behind what was waited for before; what came up to its end."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.written[self._seen :]:
            assert time.monotonic() < deadline and self._read(), f"{text!r} does not come:\n{self.shown}"
        start, self._seen = self._seen, self.written.index(text, self._seen) + len(text)
        return self.written[start : self._seen]

    def until_shown(self, text: str) -> None:
        """Wait until the screen shows ``text``, wherever its lines are broken."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text.replace(" ", "") not in "".join(self.screen.display).replace(" ", ""):
            assert time.monotonic() < deadline and self._read(), f"{text!r} is not shown:\n{self.shown}"

    @property
    def shown(self) -> str:
        """The lines of the screen that have something on them."""
        return "\n".join(line.rstrip() for line in self.screen.display if line.strip())

    def echoes(self) -> bool:
        """Whether the terminal shows by itself what is typed, as it did in the beginning."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def end(self) -> int:
        """Wait for the end; the exit code."""
        while self._read():
            pass
        code = self.process.wait(PATIENCE_SECONDS)
        self.echoed = self.echoes()
        os.close(self._master)
        return code

    def _read(self) -> bool:
        """Take what comes next; whether anything did."""
        if not select.select([self._master], [], [], PATIENCE_SECONDS)[0]:
            return False
        try:
            part = os.read(self._master, 1 << 16)
        except OSError:  # its end, on Linux
            return False
        text = self._decode(part)
        self.written += text
        self._stream.feed(text)
        return bool(part)


class _Screen(pyte.Screen):
    """A screen that answers where its cursor is."""

    def __init__(self, columns: int, rows: int, keyboard: int) -> None:
        super().__init__(columns, rows)
        self._keyboard = keyboard

    def write_process_input(self, data: str) -> None:
        os.write(self._keyboard, data.encode())
