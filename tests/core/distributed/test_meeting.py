"""Ranks find one another: those of one group, in time, and whoever else comes to the port is no matter."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlxlora_core.distributed import meeting
from mlxlora_core.distributed.environment import Meeting
from mlxlora_core.distributed.meeting import Ranks, go, listening, own_addresses, receive
from mlxlora_core.errors import RankError, UsageError

PROOF = "proof"


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with listening("127.0.0.1", 0) as server:
        yield server


def place(server: socket.socket, proof: str = PROOF, hosts: tuple[str, ...] = ("127.0.0.1",)) -> Meeting:
    return Meeting(hosts, server.getsockname()[1], proof)


def closed(ranks: Ranks) -> None:
    for line in ranks.lines:
        line.close()


def test_all_come_in_whatever_order(server: socket.socket) -> None:
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(go, place(server), rank) for rank in (3, 1, 2)]
        first = receive(server, 4, PROOF)
    assert [line.rank for line in first.lines] == [1, 2, 3]
    assert first.hosts == [socket.gethostname()] * 4
    for other in others:
        ranks = other.result()
        assert [line.rank for line in ranks.lines] == [0]
        assert ranks.hosts == first.hosts
        closed(ranks)
    closed(first)


def test_strangers_are_no_ranks(server: socket.socket) -> None:
    """One that says nothing, one that says what is no message, and one of another group."""
    address = server.getsockname()
    strangers = [socket.create_connection(address) for _ in range(3)]
    strangers[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[2].sendall(b'{"rank": 1, "proof": "of another group", "host": "x"}\n')
    with ThreadPoolExecutor() as pool:
        other = pool.submit(go, place(server), 1)
        first = receive(server, 2, PROOF)
    for stranger in strangers:
        stranger.close()
    assert first.lines[0].host == socket.gethostname()
    closed(other.result())
    closed(first)


def test_who_has_not_come_is_told_by_all(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "START_SECONDS", 1.0)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(go, place(server), 2)
        with pytest.raises(RankError, match="ranks 1, 3 of 4 did not come within 1 s of the start"):
            receive(server, 4, PROOF)
    assert "ranks 1, 3 of 4 did not come" in str(other.exception())


def test_rank_0_has_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "START_SECONDS", 0.5)
    with listening("127.0.0.1", 0) as server:
        free = place(server)
    with pytest.raises(RankError, match=rf"rank 0 did not come to 127\.0\.0\.1:{free.port} within 0 s"):
        go(free, 1)


def test_rank_0_ends_before_all_have_come(server: socket.socket) -> None:
    with ThreadPoolExecutor() as pool:
        other = pool.submit(go, place(server), 1)
        connection, _ = _accepted(server)
        connection.close()
        assert "has ended before all ranks had come" in str(other.exception())


def test_the_second_address_is_tried_where_the_first_leads_nowhere(server: socket.socket) -> None:
    with ThreadPoolExecutor() as pool:
        other = pool.submit(go, place(server, hosts=("127.77.77.77", "127.0.0.1")), 1)
        closed(receive(server, 2, PROOF))
        closed(other.result())


def test_a_port_that_is_taken(server: socket.socket) -> None:
    with pytest.raises(UsageError, match="rank 0 cannot listen at"):
        listening(*server.getsockname())


def test_a_machine_has_addresses() -> None:
    assert own_addresses()[-1] == "127.0.0.1"


def _accepted(server: socket.socket) -> tuple[socket.socket, object]:
    server.setblocking(True)
    return server.accept()
