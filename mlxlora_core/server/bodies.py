"""The body of a request, of which no more is read than is allowed."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.types import Receive

from mlxlora_core.server.faults import ProtocolError

BODY_SECONDS = 30.0
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 64 << 20


class Disconnected(Exception):
    """The client has gone."""


async def read_body(request: Request, most: int) -> bytes:
    """A body of at most ``most`` bytes.

    Raises:
        ProtocolError: it is longer, or takes longer than :data:`BODY_SECONDS`.
        Disconnected: the client has gone.
    """
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > most:
        raise _too_long(most)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                part, more = await _next(request.receive)
                body += part
                if len(body) > most:
                    raise _too_long(most)
                if not more:
                    return bytes(body)
    except TimeoutError:
        raise ProtocolError(
            408, f"the body was not there within {BODY_SECONDS:.0f} s", headers={"Connection": "close"}
        ) from None


async def linger(receive: Receive) -> None:
    """Throw away what a client still sends of a body that is too long, for a while.

    Whoever closes a connection on which something is still to be read resets it, and the client may
    never see why.
    """
    left = _LINGER_BYTES
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while left > 0:
                part, more = await _next(receive)
                left -= len(part)
                if not more:
                    return
    except (TimeoutError, Disconnected):
        return


async def wait_until_gone(receive: Receive) -> None:
    """Wait until the client has gone; its body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(receive: Receive) -> tuple[bytes, bool]:
    """A part of a body, and whether there is more."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Disconnected
    return message.get("body", b""), message.get("more_body", False)


def _too_long(most: int) -> ProtocolError:
    return ProtocolError(
        413,
        f"the body is longer than {most} bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )
