"""The endpoints of the protocol: models, chat completions, completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from mlxlora_core.server.answers import ChatForm, CompletionForm, Form, Text, TokenTexts
from mlxlora_core.server.bodies import Disconnected, read_body
from mlxlora_core.server.faults import RETRY_SECONDS, ProtocolError, of_end
from mlxlora_core.server.requests import Asked, chat_asked, completion_asked
from mlxlora_core.server.served import Running, Served
from mlxlora_core.server.sse import DONE, EventStream, event, merged, unless_gone
from mlxlora_core.server.values import parse_json

_A = TypeVar("_A", bound=Asked)

_READING = 8  # requests beside those that have a place or wait for one: bodies are held in memory

#: of a response that nobody reads
CLIENT_GONE = 499


class Protocol:
    """Answers requests of the protocol.

    Bodies are parsed, prompts rendered and encoded in a thread of their own, one after another, so that
    no long prompt holds up the answers of others; the parts of answers come through the event loop.

    Args:
        served: whose models answer.

    Attributes:
        inside: requests that are being read or answered.
    """

    def __init__(self, served: Served) -> None:
        self._served, self._texts = served, TokenTexts(served.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlxlora prompts")
        self.inside = 0
        config = served.config
        self._most_inside = config.places + config.queue + _READING
        self._most_bytes = config.max_body << 20

    def routes(self) -> list[BaseRoute]:
        """The endpoints."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        """The base, and each adapter."""
        found = [self._described(name) for name in self._served.names]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        if name not in self._served.names:
            raise ProtocolError(
                404, f"the model '{name}' does not exist", code="model_not_found", param="model"
            )
        return JSONResponse(self._described(name))

    async def chat(self, request: Request) -> ASGIApp:
        """An answer in a conversation."""
        return await self._answer(request, chat_asked, self._served.submit_chat, ChatForm)

    async def complete(self, request: Request) -> ASGIApp:
        """Prompts, continued."""
        return await self._answer(request, completion_asked, self._served.submit_completion, CompletionForm)

    def _described(self, name: str) -> dict[str, Any]:
        served = self._served
        kind = "base" if name == served.base else "adapter"
        return {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "mlxlora",
            "mlxlora": {"kind": kind, "template": served.chats},
        }

    async def _answer(
        self,
        request: Request,
        parse: Callable[[Mapping[str, Any]], _A],
        submit: Callable[[_A], Running],
        form: type[Form],
    ) -> ASGIApp:
        """Read what is asked, let the engine work, and answer."""
        if self.inside >= self._most_inside:
            wait = {"Retry-After": str(RETRY_SECONDS), "Connection": "close"}
            raise ProtocolError(
                429, "too many requests at once", code="queue_full", kind="rate_limit_error", headers=wait
            )
        self.inside += 1
        leave = _Once(self._leave)
        try:
            asked, running = await self._begin(await read_body(request, self._most_bytes), parse, submit)
            leave.also = running.cancel
            looks = form(asked.model, self._texts, logprobs=asked.logprobs is not None)
            if asked.stream:
                return EventStream(_events(asked, running, looks), leave.hold())
            choices = await unless_gone(request.receive, _choices(running, self._texts))
            return JSONResponse(looks.whole(choices, running.prompts))
        except Disconnected:
            return Response(status_code=CLIENT_GONE)
        finally:
            leave.unless_held()

    def _leave(self) -> None:
        self.inside -= 1

    async def _begin(
        self, body: bytes, parse: Callable[[Mapping[str, Any]], _A], submit: Callable[[_A], Running]
    ) -> tuple[_A, Running]:
        """What is asked, and the engine's requests for it, from the thread of prompts."""

        def work() -> tuple[_A, Running]:
            asked = parse(parse_json(body))
            return asked, submit(asked)

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class _Once:
    """What is to be done when a request has ended, by whoever sees the end.

    Args:
        leave: what is to be done.

    Attributes:
        also: what else, before it.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self.also: Callable[[], None] = lambda: None
        self._leave, self._held, self._done = leave, False, False

    def __call__(self) -> None:
        if not self._done:
            self._done = True
            self.also()
            self._leave()

    def hold(self) -> Callable[[], None]:
        """Leave it to the response, which lasts longer."""
        self._held = True
        return self

    def unless_held(self) -> None:
        """Do it, where no response does."""
        if not self._held:
            self()


async def _choices(running: Running, texts: TokenTexts) -> list[Text]:
    """All choices, once they have ended.

    Raises:
        ProtocolError: one has ended with an error.
    """
    found = [Text(texts) for _ in running.streams]
    async with aclosing(merged(running.streams)) as parts:
        async for index, delta in parts:
            found[index].add(delta)
            fault = of_end(delta)
            if fault is not None:
                raise fault
    return found


async def _events(asked: Asked, running: Running, form: Form) -> AsyncGenerator[bytes, None]:
    """The parts of all choices as they come; an error is one of them, and the last."""
    choices = [Text(form.texts) for _ in running.streams]
    more = {"usage": None} if asked.include_usage else {}
    begins = (form.begin(index) for index in range(len(choices)))
    for document in begins:
        if document is not None:
            yield event({**document, **more})
    async with aclosing(merged(running.streams)) as parts:
        async for index, delta in parts:
            fault = of_end(delta)
            if fault is not None:
                yield event(fault.document)
                yield DONE
                return
            choice = choices[index]
            tokens = choice.add(delta)
            if delta.text or tokens:
                yield event({**form.part(index, delta.text, tokens, None), **more})
            if choice.finish is not None:
                yield event({**form.part(index, None, (), choice.finish), **more})
    if asked.include_usage:
        yield event(form.told(choices, running.prompts))
    yield DONE
