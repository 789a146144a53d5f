"""What goes wrong, as the protocol tells it: a status and an ``error`` object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlxlora_core.errors import DataError, MlxloraError, ResourceError, UsageError, bounded
from mlxlora_core.model.generate import PromptTooLong
from mlxlora_core.serving.request import CANCELLED, TIMEOUT, Delta, QueueFull, Stopping

#: seconds after which a request that found no place may be sent again
RETRY_SECONDS = 1

INVALID, SERVER = "invalid_request_error", "server_error"


class ProtocolError(Exception):
    """A request that is not answered.

    Args:
        status: of the response.
        message: one line.
        code: a word for programs, or None.
        param: the field that it is about, or None.
        kind: ``type`` of the protocol; from the status where it is not said.
        headers: more of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.code, self.param = status, code, param
        self.message, self.headers = bounded(message), dict(headers or {})
        self.kind = kind or (SERVER if status >= 500 else INVALID)
        super().__init__(self.message)

    @property
    def document(self) -> dict[str, Any]:
        """The body of the response, as plain values."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def body(self) -> bytes:
        """The body of the response."""
        return json.dumps(self.document).encode()


def bad_value(param: str, what: str) -> ProtocolError:
    """The error of a field whose value makes no sense.

    Args:
        param: the field.
        what: what it is and what was wanted.
    """
    return ProtocolError(400, f"'{param}' {what}", code="invalid_value", param=param)


def of_mlxlora(fault: MlxloraError, param: str | None = None) -> ProtocolError:
    """An error of mlxlora as the protocol has it.

    Args:
        fault: what was raised.
        param: the field that holds the prompt, where the request has not begun.
    """
    words = str(fault)
    if isinstance(fault, QueueFull):
        wait = {"Retry-After": str(RETRY_SECONDS)}
        return ProtocolError(429, words, code="queue_full", kind="rate_limit_error", headers=wait)
    if isinstance(fault, Stopping):
        return ProtocolError(503, words, code="stopping", headers={"Retry-After": "10"})
    if isinstance(fault, PromptTooLong):
        return ProtocolError(400, words, code="context_length_exceeded", param=param)
    if isinstance(fault, UsageError | DataError):
        return ProtocolError(400, words, code="invalid_value")
    if isinstance(fault, ResourceError):  # of a request it is told before it begins, and never will be less
        return ProtocolError(503 if param is None else 400, words, code="out_of_memory", param=param)
    return ProtocolError(500, words)


def of_end(delta: Delta) -> ProtocolError | None:
    """What went wrong with a text that has ended; None where nothing did."""
    if delta.error is not None:
        return of_mlxlora(delta.error)
    if delta.finish == TIMEOUT:
        return ProtocolError(504, "the request took longer than this server allows", code="timeout")
    if delta.finish == CANCELLED:
        return ProtocolError(503, "the server is stopping", code="stopping")
    return None
