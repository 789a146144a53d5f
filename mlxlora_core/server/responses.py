"""Errors as responses."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlxlora_core.server.bodies import linger
from mlxlora_core.server.faults import ProtocolError

_TOO_LONG = 413


class ErrorResponse(Response):
    """The response that tells an error.

    Args:
        fault: what it tells.
    """

    def __init__(self, fault: ProtocolError) -> None:
        super().__init__(fault.body, fault.status, fault.headers, "application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; what still comes of a body that is too long is thrown away, so that it can be read."""
        if self.status_code != _TOO_LONG:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await linger(receive)
        await send({"type": "http.response.body", "body": b""})
