"""A server that answers as it is told, by the OpenAI protocol, behind the guard of the real one."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlxlora_core.server.app import Part, make_app
from mlxlora_core.server.guard import Policy
from mlxlora_core.server.page_routes import OPEN_PATHS, page_routes

SURE, OTHER = math.log(0.75), math.log(0.2)


@dataclass
class Canned:
    """What is answered.

    Attributes:
        said: model -> its answer, whatever it is asked.
        error: (status, message) in place of every answer, or None.
        midway: message of an error after the first piece, or None.
        pause: seconds before each piece.
        template: whether the models have a chat template.
        requests: the bodies that came.
        facts: what ``/api/page`` tells.
    """

    said: dict[str, str]
    error: tuple[int, str] | None = None
    midway: str | None = None
    pause: float = 0.0
    template: bool = True
    requests: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    gone: int = 0

    def __post_init__(self) -> None:
        plain = {"title": "canned", "models": list(self.said), "template": self.template, "questions": []}
        self.facts = {**plain, "token": False, "run": False, **self.facts}

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/v1/completions", self.answer, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        about = {"object": "model", "created": 0, "owned_by": "test"}
        own = {"kind": "base", "template": self.template}
        return JSONResponse({"data": [{"id": name, **about, "mlxlora": own} for name in self.said]})

    async def answer(self, request: Request) -> Response:
        asked = await request.json()
        self.requests.append(asked)
        if self.error:
            status, message = self.error
            headers = {"Retry-After": "7"} if status == 429 else {}
            return JSONResponse({"error": {"message": message}}, status, headers=headers)
        return StreamingResponse(self.pieces(asked), media_type="text/event-stream")

    async def pieces(self, asked: dict[str, Any]) -> AsyncIterator[str]:
        chat = "messages" in asked
        words = re.findall(r"\s*\S+\s*?|\s+", self.said[asked["model"]])
        ended = False
        try:
            for word in words:
                await asyncio.sleep(self.pause)
                yield event(chat_part(word) if chat else plain_part(word))
                if self.midway:
                    yield event({"error": {"message": self.midway}})
                    return
            end = {"delta": {}} if chat else {"text": ""}
            yield event({"choices": [{"index": 0, **end, "finish_reason": "stop"}]})
            yield event({"choices": [], "usage": {"completion_tokens": len(words)}})
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            self.gone += not ended


def event(value: dict[str, Any]) -> str:
    return f": a comment\ndata: {json.dumps(value)}\n\n"


def chat_part(word: str) -> dict[str, Any]:
    top = [{"token": word, "logprob": SURE}, {"token": " else", "logprob": OTHER}]
    content = [{"token": word, "logprob": SURE, "top_logprobs": top}]
    return {"choices": [{"index": 0, "delta": {"content": word}, "logprobs": {"content": content}}]}


def plain_part(word: str) -> dict[str, Any]:
    told = {"tokens": [word], "token_logprobs": [SURE], "top_logprobs": [{" else": OTHER, word: SURE}]}
    return {"choices": [{"index": 0, "text": word, "logprobs": told}]}


@contextmanager
def serving(canned: Canned, *keys: str) -> Iterator[str]:
    """The address of a server, in a thread of this process."""
    parts = [Part(canned.routes()), Part(page_routes(canned.facts), OPEN_PATHS)]
    app = make_app(None, Policy(keys=keys), parts)
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has not started"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
