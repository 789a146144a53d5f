"""What a server allows, as the command line has it. Light: it is read for ``--help``."""

from __future__ import annotations

from dataclasses import dataclass

from mlxlora_core.options import option


@dataclass(frozen=True)
class ServeConfig:
    """How much is done at once, how long it may take, and what one client may send."""

    max_tokens: int = option(
        512, help="tokens of an answer in a chat where the request says nothing", unit="tokens", minimum=1
    )
    places: int = option(16, help="requests that are answered at the same time", minimum=1, maximum=256)
    queue: int = option(64, help="requests that may wait for a place", minimum=0, maximum=10_000)
    timeout: float = option(600.0, help="after which a request is given up", unit="seconds", above=0)
    stop_timeout: float = option(
        20.0, help="that requests may take to end once the server is told to stop", unit="seconds", minimum=0
    )
    max_body: int = option(4, help="of a request at most", unit="MiB", minimum=1, maximum=1024)
    connections: int = option(256, help="connections at a time", minimum=1, maximum=10_000)
