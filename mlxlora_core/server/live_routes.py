"""The page ``/run``: a run as it grows, beside others, and the button that stops it.

All of it is read from run folders, so that it shows the same whichever process serves it.
"""

from __future__ import annotations

import hmac
import html
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mlxlora_core.errors import MlxloraError
from mlxlora_core.runs import live
from mlxlora_core.server.assets import asset, read_asset

#: what a browser needs before its reader can type a key; nothing there tells of the run
OPEN_PATHS = ("/run", "/run/")
#: the header that a request to stop carries, with what stands in the page
TOKEN_HEADER = "x-mlxlora-run"

_ASSETS = {
    "report.css": ("mlxlora_core.runs.report", "report.css", "text/css; charset=utf-8"),
    "live.css": ("mlxlora_core.server", "live/live.css", "text/css; charset=utf-8"),
    "live.js": ("mlxlora_core.server", "live/live.js", "text/javascript; charset=utf-8"),
    "chart.js": ("mlxlora_core.server", "live/chart.js", "text/javascript; charset=utf-8"),
    "parts.js": ("mlxlora_core.server", "live/parts.js", "text/javascript; charset=utf-8"),
}
_FRESH = {"Cache-Control": "no-store"}
_CHAT_LINK = '<nav aria-label="Page"><a href="/">Talk to the model</a></nav>'


def live_routes(
    folder: Path, stop: Callable[[], None] | None = None, *, chats: bool = False
) -> list[BaseRoute]:
    """The page of a run, and what it asks for.

    Args:
        folder: of the run; it need not be there yet.
        stop: ends the run as a first Ctrl-C does; None where whoever serves cannot.
        chats: whether there is a page ``/`` to talk to the model, which the page has a link to.
    """
    reading, token = live.Reading(folder), secrets.token_urlsafe(24)
    return [
        _page(token if stop is not None else "", _CHAT_LINK if chats else ""),
        *(asset(f"/run/{name}", *place) for name, place in _ASSETS.items()),
        _told("/api/run", lambda asked: live.look(reading, asked.get("cursor", ""))),
        _told("/api/run/samples", lambda asked: live.samples(folder)),
        _told("/api/run/rows", lambda asked: live.rows(folder)),
        _told("/api/run/beside", lambda asked: live.beside(folder)),
        _told("/api/run/curves", lambda asked: live.curves(folder, asked.get("name", ""))),
        *([_stop(token, stop)] if stop is not None else []),
    ]


def _told(path: str, tell: Callable[[Mapping[str, str]], Any]) -> Route:
    """What a function tells, as JSON; what it cannot tell is one line, with 404."""

    async def answer(request: Request) -> Response:
        try:
            told = await run_in_threadpool(tell, request.query_params)
        except MlxloraError as fault:
            return JSONResponse({"error": {"message": str(fault)}}, 404, headers=_FRESH)
        return JSONResponse(told, headers=_FRESH)

    return Route(path, answer)


def _page(token: str, chat_link: str) -> Route:
    """The page, with the token of this server where it has a button."""
    text = read_asset("mlxlora_core.server", "live/live.html").decode()
    content = (
        text.replace("{{token}}", html.escape(token, quote=True)).replace("{{chat}}", chat_link).encode()
    )

    async def send(request: Request) -> Response:
        return Response(content, media_type="text/html; charset=utf-8", headers=_FRESH)

    return Route("/run", send)


def _stop(token: str, stop: Callable[[], None]) -> Route:
    """Stops the run, once: a second signal would end it without saving."""
    stopped = False

    async def answer(request: Request) -> Response:
        nonlocal stopped
        if not hmac.compare_digest(request.headers.get(TOKEN_HEADER, "").encode(), token.encode()):
            return JSONResponse({"error": {"message": "that is not this page"}}, 403, headers=_FRESH)
        if not stopped:
            stopped = True
            stop()
        return JSONResponse({"stopping": True}, 202, headers=_FRESH)

    return Route("/api/run/stop", answer, methods=["POST"])
