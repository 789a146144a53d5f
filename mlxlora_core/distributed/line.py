"""A connection between two ranks, beside MLX's own: messages that are a line of JSON each."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from typing import Any

_MOST_BYTES = 1 << 16  # of a message; a longer one is none of ours
_MOST_WAITING_BYTES = 1 << 20  # that the other side has not taken


class Line:
    """One side of a connection; nothing here waits for the other, and any thread may send.

    Attributes:
        rank: of the other side.
        host: name of its machine.
        phase: what it said that it does.
        moves: how often it has said so.
        silent_seconds: how long nothing was heard of it.
        done: whether it has said that it needs nobody any more.
    """

    def __init__(self, connection: socket.socket, rank: int = -1, host: str = "") -> None:
        self.rank, self.host = rank, host
        self.phase, self.moves = "the start", 0
        self.silent_seconds, self.done = 0.0, False
        self._socket, self._lock = connection, threading.Lock()
        self._read, self._waiting = b"", b""
        connection.setblocking(False)
        with suppress(OSError):  # not every kind of socket has it
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._socket.fileno()

    def address(self) -> str:
        """The address of the other side."""
        return str(self._socket.getpeername()[0])

    def send(self, **message: Any) -> None:
        """Send a message as soon as the other side takes it; one that is gone is noticed in reading."""
        with self._lock:
            if len(self._waiting) < _MOST_WAITING_BYTES:
                self._waiting += json.dumps(message).encode() + b"\n"
            with suppress(OSError):
                self._waiting = self._waiting[self._socket.send(self._waiting) :]

    def received(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None once the other side is gone, or says what is no message."""
        try:
            data = self._socket.recv(_MOST_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.silent_seconds = 0.0
        *lines, self._read = (self._read + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        whole = all(isinstance(message, dict) for message in messages) and len(self._read) < _MOST_BYTES
        return messages if whole else None

    def close(self) -> None:
        """End the connection."""
        self._socket.close()
