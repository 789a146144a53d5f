"""What is served: an engine under the names of its models, and requests made ready for it."""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import DataError, MlxloraError
from mlxlora_core.model.prompts import Prompt, prompt_ids
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.plugins import Component, Registry
from mlxlora_core.runs.recipe import choose_samplers
from mlxlora_core.runs.samplers import TEMPERATURE, chain
from mlxlora_core.server.faults import ProtocolError, bad_value, of_mlxlora
from mlxlora_core.server.json_answers import JsonAnswers, JsonTokens
from mlxlora_core.server.json_schema import grammar_of
from mlxlora_core.server.requests import Asked, ChatAsked, CompletionAsked, adapter_of
from mlxlora_core.server.settings import ServeConfig
from mlxlora_core.serving.engine import Engine
from mlxlora_core.serving.request import Change, Request
from mlxlora_core.serving.stream import Stream

_KEPT_SCHEMAS = 16


@dataclass(frozen=True)
class Running:
    """Requests of the engine that one request of a client has become.

    Attributes:
        streams: choice by choice, those of the first prompt first.
        prompts: how many there were.
    """

    streams: Sequence[Stream]
    prompts: int

    def cancel(self) -> None:
        """End all of them; those that have ended are as they are."""
        for stream in self.streams:
            stream.cancel()


@dataclass
class Served:
    """A model with its adapters.

    Attributes:
        engine: that continues texts.
        tokenizer: of the model.
        registry: where samplers are looked up.
        base: what the model is called.
        config: what is allowed.
        created: when, in seconds since 1970.
        chats: whether the tokenizer has a form for conversations.
    """

    engine: Engine
    tokenizer: CheckedTokenizer
    registry: Registry
    base: str
    config: ServeConfig
    created: int = field(default_factory=lambda: int(time.time()))
    chats: bool = field(init=False)
    _tokens: JsonTokens | None = field(init=False, default=None)
    _answers: OrderedDict[str, JsonAnswers] = field(init=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.chats = _chats(self.tokenizer)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the base, and of each adapter."""
        return (self.base, *self.engine.names)

    def submit_chat(self, asked: ChatAsked) -> Running:
        """Let a conversation wait for its answer; from any thread but that of an event loop.

        Raises:
            ProtocolError: it cannot be asked, or there is no place.
        """
        if not self.chats:
            raise ProtocolError(
                400,
                f"'{self.base}' has no chat template: let /v1/completions continue a text",
                code="no_chat_template",
                param="messages",
            )
        most = asked.max_tokens or self.config.max_tokens
        return self._submit(asked, "messages", [asked.messages], most)

    def submit_completion(self, asked: CompletionAsked) -> Running:
        """Let prompts wait to be continued; from any thread but that of an event loop.

        Raises:
            ProtocolError: they cannot be asked, or there is no place.
        """
        return self._submit(asked, "prompt", asked.prompts, asked.max_tokens or self.config.max_tokens)

    def _submit(
        self, asked: Asked, param: str, prompts: Sequence[Prompt | tuple[int, ...]], most: int
    ) -> Running:
        adapter = adapter_of(asked, self.base, self.engine.names)
        samplers = self._samplers(asked)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        streams: list[Stream] = []
        try:
            for prompt in prompts:
                ids = self._ids(prompt)
                for _ in range(asked.n):
                    request = Request(
                        ids,
                        adapter=adapter,
                        samplers=samplers,
                        seed=(seed + len(streams)) % 2**32,
                        max_tokens=most,
                        stop=asked.stop,
                        logprobs=asked.logprobs,
                        deadline=self.config.timeout,
                        change=self._change(asked),
                    )
                    streams.append(self.engine.submit(request))
        except MlxloraError as fault:
            Running(streams, len(prompts)).cancel()
            raise of_mlxlora(fault, param) from fault
        return Running(streams, len(prompts))

    def _ids(self, prompt: Prompt | tuple[int, ...]) -> list[int]:
        if isinstance(prompt, tuple) and all(type(token) is int for token in prompt):
            return list(prompt)
        return prompt_ids(self.tokenizer, prompt)  # type: ignore[arg-type]  # the tuple of ids is above

    def _samplers(self, asked: Asked) -> list[tuple[Component, Any]]:
        use, values = chain(None, asked.settings)
        chosen = choose_samplers(use, {**values, TEMPERATURE: asked.temperature}, self.registry)
        return [(choice.component, choice.options) for choice in chosen]

    def _change(self, asked: Asked) -> Change | None:
        """What is done to the logits of one text before samplers get them."""
        found = []
        odd = [token for token in asked.bias if token >= self.tokenizer.vocab_size]
        if odd:
            raise bad_value(
                "logit_bias", f"has the token {odd[0]}, ids go to {self.tokenizer.vocab_size - 1}"
            )
        if asked.bias:
            found.append(biased(asked.bias))
        if asked.schema:
            found.append(self._json_answers(asked.schema).change())
        return in_turn(found) if found else None

    def _json_answers(self, schema: str) -> JsonAnswers:
        """Answers that hold to a schema; what is found out of one is kept for the next request."""
        if self._tokens is None:
            self._tokens = JsonTokens(self.tokenizer)
        if schema not in self._answers:
            grammar, way = grammar_of(json.loads(schema))
            lacks = self._tokens.lacks(grammar.letters)
            if lacks:
                raise bad_value("response_format", f"needs tokens for {lacks!r}, which this model has not")
            self._answers[schema] = JsonAnswers(self._tokens, grammar, way)
            if len(self._answers) > _KEPT_SCHEMAS:
                self._answers.popitem(last=False)
        self._answers.move_to_end(schema)
        return self._answers[schema]


def in_turn(changes: Sequence[Change]) -> Change:
    """Changes one after another."""

    def change(logits: mx.array, drawn: Sequence[int], left: int) -> mx.array:
        for each in changes:
            logits = each(logits, drawn, left)
        return logits

    return change


def biased(bias: Mapping[int, float]) -> Change:
    """A change that adds to the logits of some tokens.

    Args:
        bias: token id -> what is added.
    """
    ids, values = mx.array(list(bias)), mx.array(list(bias.values()))

    def change(logits: mx.array, drawn: Sequence[int], left: int) -> mx.array:
        return logits.at[:, ids].add(values)

    return change


def _chats(tokenizer: CheckedTokenizer) -> bool:
    try:
        tokenizer.render([{"role": "user", "content": "Hello"}])
    except DataError:
        return False
    return True
