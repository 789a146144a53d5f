"""Connections that keep a server waiting, on an application of their own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlxlora_core.machine.signals import Pending
from mlxlora_core.server import connections, run

ended = threading.Event()


async def flood(scope: Any, receive: Any, send: Any) -> None:
    """Sends until it is told to end."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while not ended.is_set():
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})


@contextmanager
def served(app: Any) -> Iterator[int]:
    """The port of a server of ``app``, in a thread."""
    pending, listening = Pending(), run.listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    arguments: dict[str, Any] = {"connections": 16, "stop_seconds": 0.0}
    thread = threading.Thread(target=run.serve, args=(app, listening, pending), kwargs=arguments)
    thread.start()
    try:
        yield port
    finally:
        ended.set()
        pending.signum = 15
        thread.join(30)
        ended.clear()
        listening.close()
    assert not thread.is_alive()


def lasts(port: int, begin: Callable[[socket.socket], object], most: float = 20) -> float:
    """How many seconds a connection lasts whose client begins so, and then does nothing."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        begin(connection)
        started = time.monotonic()
        while time.monotonic() < started + most and not has_ended(connection):
            time.sleep(0.05)
        return time.monotonic() - started


def has_ended(connection: socket.socket) -> bool:
    """Whether the other end has closed it; what has come is left where it is."""
    try:
        if not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def test_a_client_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.5)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 60.0)
    with served(flood) as port:
        assert lasts(port, lambda c: c.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")) < 15


@pytest.mark.parametrize("begun", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_a_client_that_asks_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with served(flood) as port:
        assert lasts(port, lambda c: c.sendall(begun)) < 15


def test_who_waits_within_the_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the two above would show nothing."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 60.0)
    with served(flood) as port:
        assert lasts(port, lambda c: None, most=2) >= 2
