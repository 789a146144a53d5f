"""The page at ``/``: its files as they are shipped, and what it has to know of the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mlxlora_core.server.assets import asset

_PACKAGE = "mlxlora_core.server"

#: file name -> its content type; the modules import each other by these names
ASSETS = {
    "icon.svg": "image/svg+xml",
    "page.css": "text/css; charset=utf-8",
    **dict.fromkeys(
        (
            "answer.js",
            "conversation.js",
            "elements.js",
            "main.js",
            "markdown.js",
            "protocol.js",
            "settings.js",
            "tip.js",
            "tokens.js",
            "words.js",
        ),
        "text/javascript; charset=utf-8",
    ),
}
#: what a browser needs before its reader can type a key: nothing there tells of the model or the run
OPEN_PATHS = ("/", "/page/")


def page_routes(facts: Mapping[str, Any]) -> list[BaseRoute]:
    """The page, its files below ``/page/``, and ``/api/page``.

    Args:
        facts: what ``/api/page`` answers: ``title``, ``models`` (ids), ``template`` (whether they have a chat
            template), ``questions`` (each with ``prompt`` and ``answer``, which may be None, and where a run
            has asked it, ``chat`` and ``system`` as there), ``token`` (whether an API key is wanted) and
            ``run`` (whether there is a page ``/run``).
    """
    told = dict(facts)

    async def tell(request: Request) -> Response:
        return JSONResponse(told, headers={"Cache-Control": "no-store"})

    return [
        asset("/", _PACKAGE, "page/index.html", "text/html; charset=utf-8"),
        *(asset(f"/page/{name}", _PACKAGE, f"page/{name}", kind) for name, kind in ASSETS.items()),
        Route("/api/page", tell),
    ]
