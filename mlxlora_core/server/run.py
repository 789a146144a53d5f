"""A server in this process, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from mlxlora_core.errors import UsageError
from mlxlora_core.machine.signals import Pending
from mlxlora_core.server.connections import Connection, Connections

_HEAD_BYTES = 32 << 10
_BACKLOG = 128  # connections that the system holds until they are taken
_SPARE_FILES = 64 + _BACKLOG
_KEEP_ALIVE_SECONDS = 10
_MORE_SECONDS = 2.0  # that are left to tell clients of a stop


def listen(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; connections wait from now on.

    Raises:
        UsageError: there is no such address, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError, OverflowError) as fault:
        why = getattr(fault, "strerror", None) or fault
        raise UsageError(
            f"cannot listen on {host} port {port}: {why}", fix="choose another with --port or --host"
        ) from fault


def url_of(listening: socket.socket) -> str:
    """Where a socket can be reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: ASGIApp,
    listening: socket.socket,
    pending: Pending,
    *,
    connections: int,
    stop: Callable[[], None] = lambda: None,
    stop_seconds: float = 0.0,
) -> None:
    """Serve until a signal has come.

    Args:
        app: the application.
        listening: as :func:`listen` gives it.
        pending: where a signal is noted.
        connections: at a time, at most.
        stop: ends what is still to do, within ``stop_seconds``; called in a thread of its own.
        stop_seconds: after which connections are cut a little later.
    """
    held = Connections(_affordable(connections))
    for name in ("uvicorn.error", "asyncio"):  # what clients do wrong is none of the log's affair
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        app,
        http=partial(Connection, held),  # type: ignore[arg-type]  # whatever makes a protocol
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=stop_seconds + _MORE_SECONDS,  # type: ignore[arg-type]  # a number will do
        h11_max_incomplete_event_size=_HEAD_BYTES,
    )
    asyncio.run(_Server(config, held, pending, stop).serve(sockets=[listening]))


class _Server(uvicorn.Server):
    """A server that looks after its connections, and leaves signals to others.

    Args:
        config: of uvicorn.
        held: its connections.
        pending: where a signal is noted.
        stop: as for :func:`serve`.
    """

    def __init__(
        self, config: uvicorn.Config, held: Connections, pending: Pending, stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._held, self._pending, self._stop = held, pending, stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signal."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Look around, ten times a second; whether to end."""
        self._held.sweep(time.monotonic())
        self.should_exit = self.should_exit or self._pending.signum is not None
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, and let what is under way end."""
        stopping = asyncio.create_task(asyncio.to_thread(self._stop))
        await super().shutdown(sockets)
        await stopping


def _affordable(connections: int) -> int:
    """How many connections there are file descriptors for, after asking for as many as are needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(8, min(connections, soft - _SPARE_FILES))
