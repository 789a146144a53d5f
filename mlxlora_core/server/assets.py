"""Files of the pages, as they are shipped."""

from __future__ import annotations

from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def asset(path: str, package: str, name: str, media_type: str) -> Route:
    """A file of a package at a path; a browser that has it already is told so."""
    content = read_asset(package, name)
    tag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}

    async def send(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if tag in (each.strip().removeprefix("W/") for each in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return Route(path, send)


def read_asset(package: str, name: str) -> bytes:
    """The bytes of a file of a package."""
    return files(package).joinpath(name).read_bytes()
