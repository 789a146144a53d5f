"""The ranks find one another before MLX joins them, which waits for ever for one that does not come.

Rank 0 listens, the others connect to it and say who they are. When all have come, each is told the
machines of all.
"""

from __future__ import annotations

import itertools
import selectors
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mlxlora_core.distributed.environment import Meeting
from mlxlora_core.distributed.line import Line
from mlxlora_core.errors import RankError, UsageError, bounded, listing, short

START_SECONDS = 20.0  # from when a rank comes until all others have to be there
_AFTERWARDS_SECONDS = 4.0  # in which rank 0 says who has not come
_RETRY_SECONDS = 0.2
_FIX = "see whether it was started, and whether its machine can reach that of rank 0"


@dataclass(frozen=True)
class Ranks:
    """The other ranks, as this one knows them.

    Attributes:
        rank: of this process.
        hosts: the name of the machine of each rank.
        lines: of rank 0 to each other, and of each other to rank 0.
    """

    rank: int
    hosts: Sequence[str]
    lines: Sequence[Line]

    def called(self, rank: int) -> str:
        """What a rank is called in a message."""
        return f"rank {rank} on {self.hosts[rank]}"

    def tell_left(self, phase: str, fault: object) -> None:
        """Say to the others that this rank ends by a fault, and at what."""
        what = bounded(f"{self.called(self.rank)} has ended at {phase}: ", fault)
        for line in self.lines:
            line.send(left=what, rank=self.rank)


def listening(host: str, port: int) -> socket.socket:
    """Where rank 0 waits for the others.

    Args:
        host: an address of this machine; empty is all that it has.
        port: 0 takes one that is free.

    Raises:
        UsageError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(1024)
    except OSError as fault:
        server.close()
        what = f"rank 0 cannot listen at {host}:{port}: {fault.strerror or fault}"
        raise UsageError(what, fix="name an address of its machine, and ports that are free") from fault
    server.setblocking(False)
    return server


def receive(server: socket.socket, size: int, proof: str) -> Ranks:
    """Wait, as rank 0, until all others have come.

    Raises:
        RankError: some have not, within :data:`START_SECONDS`; those that have are told.
    """
    lines: dict[int, Line] = {}
    with server, selectors.DefaultSelector() as selector, _kept(lines) as came:
        selector.register(server, selectors.EVENT_READ)
        for line, message in _arrivals(selector, server, time.monotonic() + START_SECONDS, came):
            number = message.get("rank")
            if message.get("proof") == proof and isinstance(number, int) and 0 < number < size:
                line.rank, line.host = number, short(message.get("host", ""), 100)
                lines[number] = line
            if len(lines) == size - 1:
                break
    missing = [number for number in range(1, size) if number not in lines]
    if missing:
        ranks = f"rank{'s'[: len(missing) - 1]} {listing(missing)}"
        what = f"{ranks} of {size} did not come within {START_SECONDS:.0f} s of the start"
        for line in lines.values():
            line.send(lost=what)
            line.close()
        raise RankError(what, fix=_FIX)
    hosts = [socket.gethostname(), *(lines[number].host for number in range(1, size))]
    for line in lines.values():
        line.send(hosts=hosts)
    return Ranks(0, hosts, [lines[number] for number in range(1, size)])


@contextmanager
def _kept(lines: Mapping[int, Line]) -> Iterator[list[Line]]:
    """A list of all connections, of which only those in ``lines`` are open after the block."""
    came: list[Line] = []
    try:
        yield came
    finally:
        for line in came:
            if line not in lines.values():
                line.close()


def _arrivals(
    selector: selectors.BaseSelector, server: socket.socket, deadline: float, came: list[Line]
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each connection with the first message on it; all of them are put into ``came``."""
    while (left := deadline - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            if key.fileobj is server:
                connection, _address = server.accept()
                line = Line(connection)
                came.append(line)
                selector.register(line, selectors.EVENT_READ, line)
                continue
            messages = key.data.received()
            if messages is None or messages:
                selector.unregister(key.data)
            if messages:
                yield key.data, messages[0]


def go(meeting: Meeting, rank: int) -> Ranks:
    """Go to rank 0, and wait there for the others.

    Raises:
        RankError: rank 0 or another one has not come within :data:`START_SECONDS`.
    """
    place = f"{meeting.hosts[0]}:{meeting.port}"
    late = RankError(f"rank 0 did not come to {place} within {START_SECONDS:.0f} s of the start", fix=_FIX)
    deadline = time.monotonic() + START_SECONDS
    line = _connected(meeting, deadline)
    if line is None:
        raise late
    line.send(rank=rank, proof=meeting.proof, host=socket.gethostname())
    try:
        hosts = _told_hosts(line, deadline + _AFTERWARDS_SECONDS, place)
        if hosts is None:
            raise late
    except RankError:
        line.close()
        raise
    line.rank, line.host = 0, hosts[0]
    return Ranks(rank, hosts, [line])


def _told_hosts(line: Line, deadline: float, place: str) -> list[str] | None:
    """The machines of all ranks, as rank 0 tells them; None when it says nothing.

    Raises:
        RankError: some have not come, or rank 0 has ended.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            selector.select(left)
            messages = line.received()
            if messages is None:
                raise RankError(f"rank 0 at {place} has ended before all ranks had come", fix=_FIX)
            for message in messages:
                if "lost" in message:
                    raise RankError(str(message["lost"]), fix=_FIX)
                if "hosts" in message:
                    return [str(host) for host in message["hosts"]]
    return None


def _connected(meeting: Meeting, deadline: float) -> Line | None:
    """A connection to rank 0, which may listen later; None when it does not."""
    for host in itertools.cycle(meeting.hosts):
        if (left := deadline - time.monotonic()) <= 0:
            return None
        try:
            connection = socket.create_connection((host, meeting.port), timeout=left)
        except OSError:
            time.sleep(_RETRY_SECONDS)
            continue
        if connection.getsockname() != connection.getpeername():
            return Line(connection)
        connection.close()  # a port that nobody listens on may be given to the one who looks for it
    return None


def own_addresses() -> tuple[str, ...]:
    """Names and addresses by which other machines may reach this one, the likeliest first."""
    found = []
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # of documentation
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))  # sends nothing, but chooses an address to send from
            found.append(str(probe.getsockname()[0]))
    return (*found, socket.gethostname(), "127.0.0.1")
