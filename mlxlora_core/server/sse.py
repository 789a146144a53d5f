"""Answers that come as they are drawn: server-sent events, and the end of work that nobody waits for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from mlxlora_core.server.bodies import Disconnected, wait_until_gone
from mlxlora_core.serving.request import Delta
from mlxlora_core.serving.stream import Stream

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_WAITING_PARTS = 8  # of all choices together; what is not taken waits in the streams


def event(document: Mapping[str, Any]) -> bytes:
    """A document as one event."""
    return (
        b"data: "
        + json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        + b"\n\n"
    )


async def merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The parts of several streams as they come, each with the number of its stream."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    parts: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue(_WAITING_PARTS)

    async def follow(index: int, stream: Stream) -> None:
        async for delta in stream:
            await parts.put((index, delta))

    followers = [asyncio.create_task(follow(*each)) for each in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, delta = await parts.get()
            left -= delta.finish is not None
            yield index, delta
    finally:
        for follower in followers:
            follower.cancel()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What some work gives.

    Args:
        receive: of a request whose body was read.
        work: that is given up when its client goes.

    Raises:
        Disconnected: the client has gone.
    """
    doing, gone = asyncio.create_task(work), asyncio.create_task(wait_until_gone(receive))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Disconnected
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()


class EventStream:
    """A response of events; as slow as its reader.

    Args:
        events: the response, in parts.
        leave: called at the end, whichever it is.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], leave: Callable[[], None]) -> None:
        self._events, self._leave = events, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, until it ends or the client goes."""
        try:
            await unless_gone(receive, self._send(send))
        except Disconnected:
            pass
        finally:
            self._leave()

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._events) as events:
            async for part in events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
