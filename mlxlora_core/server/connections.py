"""Connections: how many there may be at a time, and how long one may keep the server waiting."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

#: seconds that the head of a request may take, and those between two requests
HEAD_SECONDS = 15.0
#: seconds after which a client that takes nothing of its response is given up
WRITE_SECONDS = 30.0

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
)


class Connections:
    """The connections of a server.

    Where there are as many as may be, a new one takes the place of that which has been without a
    request for the longest time; where all have one, it is refused.

    Args:
        most: at a time.

    Attributes:
        refused: how many were refused.
        dropped: how many had to go.
    """

    def __init__(self, most: int) -> None:
        self.most, self.refused, self.dropped = most, 0, 0
        self._held: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._held)

    def admit(self, connection: Connection) -> bool:
        """Take a connection in; whether there is room for it."""
        if len(self._held) >= self.most:
            idle = [each for each in self._held if each.idle]
            if not idle:
                self.refused += 1
                return False
            self._drop(min(idle, key=lambda each: each.since))
        self._held.add(connection)
        return True

    def forget(self, connection: Connection) -> None:
        """Let go of a connection that has ended."""
        self._held.discard(connection)

    def sweep(self, now: float) -> None:
        """Drop those that have kept the server waiting for too long."""
        for each in list(self._held):
            if each.overdue(now):
                self._drop(each)

    def _drop(self, connection: Connection) -> None:
        self.dropped += 1
        self._held.discard(connection)
        connection.abort()


class Connection(H11Protocol):
    """One connection.

    Args:
        connections: that it is one of.
        more: as uvicorn gives it.

    Attributes:
        since: when it began to wait for a request, by ``time.monotonic``.
    """

    def __init__(self, connections: Connections, **more: Any) -> None:
        super().__init__(**more)
        self._all, self.since = connections, time.monotonic()
        self._unsent, self._unsent_since = 0, self.since

    @property
    def idle(self) -> bool:
        """Whether it waits for a request, or for the rest of one's head."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin, where there is room."""
        super().connection_made(transport)
        if not self._all.admit(self):
            transport.write(_FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._all.forget(self)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.since = time.monotonic()
        super().on_response_complete()

    def abort(self) -> None:
        """End it at once; what was not taken yet, the system's part included, is thrown away."""
        taken = self.transport.get_extra_info("socket")
        if taken is not None and self.transport.get_write_buffer_size():
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def overdue(self, now: float) -> bool:
        """Whether it has kept the server waiting for too long; to be asked again and again."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        if now - self._unsent_since > WRITE_SECONDS:
            return True
        return self.idle and not unsent and now - self.since > HEAD_SECONDS
