"""Who may ask, and what every response says to browsers."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxlora_core.server.faults import ProtocolError
from mlxlora_core.server.responses import ErrorResponse

#: what a browser may do with a page of this server
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_READING = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Policy:
    """Who may ask.

    Attributes:
        keys: of which a request needs one; nothing where it needs none.
        any_host: whether the ``Host`` may be another than the loopback address.
        open_paths: that need no key; one that ends with a slash stands for all below it.
    """

    keys: Sequence[str] = ()
    any_host: bool = False
    open_paths: Sequence[str] = ("/health",)

    def is_open(self, path: str) -> bool:
        """Whether a path needs no key."""
        return any(
            path == each or (each.endswith("/") and each != "/" and path.startswith(each))
            for each in self.open_paths
        )


class Guard:
    """Refuses those who may not ask, before anything else is done.

    Args:
        app: that answers the others.
        policy: who may ask.

    Attributes:
        statuses: status -> responses.
    """

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self._app, self._policy = app, policy
        self._digests = [_digest(key) for key in policy.keys]
        self.statuses: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refusal(scope)
        app = self._app if refused is None else ErrorResponse(refused)
        await app(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> ProtocolError | None:
        """Why a request is not answered."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._policy.any_host and not is_loopback(_name_of(host)):
            return ProtocolError(
                421, f"this server is not {host!r}: it answers to localhost", code="wrong_host"
            )
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy that goes by the other one takes a part of the body for a request (RFC 9112, 6.1).
            both = "a request says its length twice, by Content-Length and by Transfer-Encoding"
            return ProtocolError(400, both, code="ambiguous_length", headers={"Connection": "close"})
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != host
        foreign = foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if scope["method"] not in _READING and foreign:
            return ProtocolError(403, "pages of other sites may not ask this server", code="foreign_origin")
        if self._digests and not self._policy.is_open(scope["path"]) and not self._knows(headers):
            return ProtocolError(
                401,
                "no valid API key was given: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _knows(self, headers: Headers) -> bool:
        """Whether a key of ours comes along; how long that takes does not tell how near one is."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(found)


def is_loopback(name: str) -> bool:
    """Whether a name or an address is that of this machine for itself."""
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _name_of(host: str) -> str:
    """The name in a ``Host`` header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
