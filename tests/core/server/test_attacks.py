"""Clients that mean harm: huge bodies, thousands of connections, slow readers and slow writers."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from served_models import NO_END, ServerProcess

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
COMPLETIONS = "/v1/completions"
ASKED = {"model": "model", "prompt": "the", "max_tokens": 3, "seed": 1}
CONNECTIONS = 10_000 if ALL else 2_000
GIGABYTE = 1 << 30
_PART = b"x" * (1 << 16)


@pytest.fixture(scope="module")
def many_files() -> Iterator[None]:
    """As many files as this process may have open, and its children with it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def connected(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def answer(server: ServerProcess) -> tuple[int, float]:
    """Status of an honest request, and the seconds that it took."""
    started = time.monotonic()
    status, _, _ = server.request("POST", COMPLETIONS, ASKED)
    return status, time.monotonic() - started


def sent_until_refused(connection: socket.socket, parts: Iterator[bytes]) -> tuple[bytes, int]:
    """What came back, and how many bytes the server took."""
    taken = 0
    with suppress(OSError):
        for part in parts:
            connection.sendall(part)
            taken += len(part)
    found = b""
    with suppress(OSError):
        while part := connection.recv(1 << 16):
            found += part
    return found, taken


@pytest.mark.parametrize("chunked", [False, True])
def test_of_a_gigabyte_no_more_is_kept_than_allowed(server: ServerProcess, chunked: bool) -> None:
    answer(server)
    before = server.memory_bytes()
    form = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {GIGABYTE}"
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n{form}\r\n\r\n".encode()
    part = b"%x\r\n%s\r\n" % (len(_PART), _PART) if chunked else _PART

    def parts() -> Iterator[bytes]:
        yield head
        for _ in range(GIGABYTE // len(_PART)):
            yield part

    with connected(server) as connection:
        found, taken = sent_until_refused(connection, parts())
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body)["error"]["code"] == "request_too_large"
    assert taken < GIGABYTE // 4
    assert server.memory_bytes() - before < 64 << 20
    assert answer(server)[0] == 200


def test_a_length_that_is_a_lie_waits_no_longer_than_its_client(server: ServerProcess) -> None:
    for form in ("Content-Length: 99999999999999999999999", "Content-Length: -1", "Content-Length: x"):
        with connected(server) as connection:
            connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n{form}\r\n\r\n{{".encode())
            connection.shutdown(socket.SHUT_WR)
            head = connection.recv(1 << 16)
        assert head.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 "))
    with connected(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    assert answer(server)[0] == 200


def test_a_body_with_two_lengths_is_no_way_past_a_proxy(server: ServerProcess) -> None:
    """What stands behind the shorter one would be a request of its own to one of the two."""
    hidden = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    forms = f"Content-Length: {5 + len(hidden)}\r\nTransfer-Encoding: chunked"
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n{forms}\r\n\r\n".encode()
    with connected(server) as connection:
        found, _ = sent_until_refused(connection, iter([head + b"0\r\n\r\n" + hidden]))
    assert found.startswith(b"HTTP/1.1 400 ") and b"ambiguous_length" in found
    assert b'{"status":"ok"}' not in found


def test_heads_that_are_too_long_are_refused(server: ServerProcess) -> None:
    for head in (b"GET /" + b"x" * 100_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, b"\0" * 200_000):
        with connected(server) as connection:
            found, _ = sent_until_refused(connection, iter([head]))
        assert found.startswith(b"HTTP/1.1 400 ")
    assert answer(server)[0] == 200


@pytest.mark.usefixtures("many_files")
def test_thousands_of_connections_leave_room_for_an_honest_one(begin: Callable[..., ServerProcess]) -> None:
    with begin() as server, ExitStack() as held:
        answer(server)
        before, slowest = server.memory_bytes(), 0.0
        for count in range(CONNECTIONS):
            connection = held.enter_context(connected(server))
            if count % 3:
                with suppress(OSError):  # the server may have let go of it
                    connection.sendall(
                        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"[: 10 * (count % 7)]
                    )
            if count % 250 == 249:
                status, seconds = answer(server)
                assert status == 200, count
                slowest = max(slowest, seconds)
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 256 + 64
        assert server.memory_bytes() - before < 64 << 20
        assert slowest < 20


@pytest.mark.usefixtures("many_files")
def test_where_all_connections_are_at_work_a_new_one_is_refused(begin: Callable[..., ServerProcess]) -> None:
    with begin("--connections", 8) as server, ExitStack() as held:
        for _ in range(8):  # the head is there, the body is not
            connection = held.enter_context(connected(server))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            )
            time.sleep(0.02)
        with connected(server) as late:
            assert late.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
        held.close()
        assert answer(server)[0] == 200


def test_readers_that_read_nothing_hold_up_nobody(begin: Callable[..., ServerProcess]) -> None:
    asked = {**ASKED, "max_tokens": 240, "logit_bias": NO_END, "logprobs": 20, "stream": True, "n": 4}
    body = json.dumps(asked).encode()
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (
        COMPLETIONS.encode(),
        len(body),
    )
    with begin("--queue", 1000) as server, ExitStack() as held:
        answer(server)
        before = server.memory_bytes()
        for _ in range(4):
            connection = socket.socket()
            held.enter_context(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(head + body)
        server.until('finished_total{reason="length"}', 1 + 16, seconds=60)
        assert server.metric("running") == 0, "their places are free"
        assert answer(server)[0] == 200
        assert server.memory_bytes() - before < 256 << 20
        assert "Traceback" not in server.errors()


def test_pipelined_requests_are_answered_in_turn(server: ServerProcess) -> None:
    with connected(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        found = b""
        while found.count(b'{"status":"ok"}') < 50:
            part = connection.recv(1 << 16)
            assert part
            found += part


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
)
def test_what_is_no_honest_http_harms_nothing(server: ServerProcess, raw: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            found = connection.recv(1 << 16)
            assert b"HTTP/1.1 500" not in found
    assert answer(server)[0] == 200
    assert "Traceback" not in server.errors()
