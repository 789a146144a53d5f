"""Messages between two ranks: whole ones, in order, and no waiting."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from mlxlora_core.distributed.line import Line


@pytest.fixture
def pair() -> Iterator[tuple[Line, socket.socket]]:
    """A line, and the raw other side of it."""
    one, other = socket.socketpair()
    line = Line(one)
    yield line, other
    line.close()
    other.close()


def test_messages_arrive_whole(pair: tuple[Line, socket.socket]) -> None:
    line, other = pair
    assert line.received() == []
    other.sendall(b'{"a": 1}\n{"b"')
    assert line.received() == [{"a": 1}]
    other.sendall(b': "\\u00e4"}\n')
    assert line.received() == [{"b": "\u00e4"}]


def test_what_is_heard_ends_a_silence(pair: tuple[Line, socket.socket]) -> None:
    line, other = pair
    line.silent_seconds = 5.0
    line.received()
    assert line.silent_seconds == 5.0
    other.sendall(b"{")
    line.received()
    assert line.silent_seconds == 0.0


@pytest.mark.parametrize("said", [b"hello\n", b"[1]\n", b"\xff\n", b"7\n", b"x" * (1 << 16)])
def test_what_is_no_message_is_the_end_of_it(pair: tuple[Line, socket.socket], said: bytes) -> None:
    line, other = pair
    other.sendall(said)
    heard = line.received()
    assert heard is None or (heard == [] and line.received() is None)


def test_the_other_side_is_gone(pair: tuple[Line, socket.socket]) -> None:
    line, other = pair
    other.close()
    assert line.received() is None
    line.send(a=1)  # and nobody minds


def test_sending_does_not_wait_for_who_does_not_listen(pair: tuple[Line, socket.socket]) -> None:
    line, other = pair
    count = 20_000
    for number in range(count):
        line.send(number=number, text="x" * 100)
    other.settimeout(10)
    data = b""
    while b'"number": 5000,' not in data:  # more than a socket holds
        data += other.recv(1 << 16)
        line.send(number=count)
    lines = data.split(b"\n")[:-1]
    assert all(part.startswith(b'{"number": ') and part.endswith(b"}") for part in lines)
