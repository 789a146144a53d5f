"""The application: routes of the protocol and of others, guarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from mlxlora_core.errors import MlxloraError
from mlxlora_core.server.faults import ProtocolError, of_mlxlora
from mlxlora_core.server.guard import Guard, Policy
from mlxlora_core.server.metrics import in_words
from mlxlora_core.server.protocol_routes import Protocol
from mlxlora_core.server.responses import ErrorResponse
from mlxlora_core.server.served import Served


@dataclass(frozen=True)
class Part:
    """Routes that come to those of the protocol.

    Attributes:
        routes: they.
        open_paths: of them, those that need no key, as of :class:`~mlxlora_core.server.guard.Policy`.
    """

    routes: Sequence[BaseRoute]
    open_paths: Sequence[str] = ()


def make_app(
    served: Served | None,
    policy: Policy,
    parts: Sequence[Part] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> ASGIApp:
    """An application.

    Args:
        served: whose models answer; None for an application of ``parts`` alone.
        policy: who may ask.
        parts: more routes.
        tell: called with a line on each defect.
    """
    opened = [*policy.open_paths, *(path for part in parts for path in part.open_paths)]
    routes: list[BaseRoute] = [route for part in parts for route in part.routes]
    protocol = None if served is None else Protocol(served)
    if protocol is not None:
        routes = [*protocol.routes(), *routes]
    app = Starlette(routes=routes, exception_handlers=_handlers(tell))
    app.router.redirect_slashes = False
    guard = Guard(app, replace(policy, open_paths=tuple(opened)))
    if served is not None and protocol is not None:
        app.router.routes[:0] = _own_routes(served, protocol, guard)
    return guard


def _own_routes(served: Served, protocol: Protocol, guard: Guard) -> list[BaseRoute]:
    """What a server tells of itself."""

    async def health(request: Request) -> Response:
        state = served.engine.state
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def metrics(request: Request) -> Response:
        text = in_words(served.engine.metrics(), guard.statuses, protocol.inside)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return [Route("/health", health), Route("/metrics", metrics)]


def _handlers(tell: Callable[[str], None]) -> dict[type[Exception], Callable[[Request, Exception], Response]]:
    """What each kind of error is answered with."""

    def of_protocol(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, ProtocolError)
        return ErrorResponse(fault)

    def of_ours(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, MlxloraError)
        return ErrorResponse(of_mlxlora(fault))

    def of_http(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, HTTPException)
        words = f"{fault.detail}: {request.method} {request.url.path}"
        return ErrorResponse(ProtocolError(fault.status_code, words, headers=fault.headers))

    def of_defect(request: Request, fault: Exception) -> Response:
        tell(f"mlxlora: a defect of mlxlora: {type(fault).__name__}: {fault}")
        return ErrorResponse(ProtocolError(500, "a defect of the server; its log tells more"))

    return {ProtocolError: of_protocol, MlxloraError: of_ours, HTTPException: of_http, Exception: of_defect}
