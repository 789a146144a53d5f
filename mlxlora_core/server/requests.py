"""What a request asks for, read out of its body."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxlora_core.runs.samplers import SETTINGS
from mlxlora_core.server.faults import ProtocolError, bad_value
from mlxlora_core.server.fields import CHAT_FIELDS, COMPLETION_FIELDS, check_fields
from mlxlora_core.server.values import Values
from mlxlora_core.serving.engine import MOST_LOGPROBS

MOST_CHOICES = 16
MOST_MESSAGES = 1024  # the beginnings of a conversation are rendered one by one, and others wait for it
MOST_STOPS = 16
MOST_STOP_LETTERS = 4096  # whether a text ends with a part of one is found in the engine's thread
MOST_BIASES = 1024
COMPLETION_TOKENS = 16  # where a request for a completion says nothing: as the protocol has it

_MOST_TOKENS = 1 << 31
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Asked:
    """What requests of both kinds have.

    Attributes:
        model: the name of the base or of an adapter.
        stream: whether the answer comes as it is drawn.
        include_usage: whether its last event tells the usage.
        n: choices a prompt.
        max_tokens: of each; None where nothing is said.
        stop: texts before which it ends.
        seed: None where nothing is said.
        temperature: 0 is the most likely token.
        settings: of :data:`mlxlora_core.runs.samplers.SETTINGS`.
        logprobs: how many most likely tokens are told beside each; None for no log-probabilities.
        bias: token id -> what is added to its logit.
        schema: the JSON schema that the answer holds to, as JSON; nothing for an answer in any form.
    """

    model: str
    stream: bool
    include_usage: bool
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    seed: int | None
    temperature: float
    settings: Mapping[str, float]
    logprobs: int | None
    bias: Mapping[int, float]
    schema: str = ""


@dataclass(frozen=True)
class ChatAsked(Asked):
    """A conversation that waits for an answer.

    Attributes:
        messages: of role and content.
    """

    messages: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class CompletionAsked(Asked):
    """Prompts to continue.

    Attributes:
        prompts: texts, or token ids.
    """

    prompts: tuple[str | tuple[int, ...], ...] = ()


def chat_asked(body: Mapping[str, Any]) -> ChatAsked:
    """A request for ``/v1/chat/completions``.

    Raises:
        ProtocolError: a field that makes no sense.
    """
    check_fields(body, CHAT_FIELDS)
    values = Values(body)
    most = values.whole("max_completion_tokens", 1, _MOST_TOKENS)
    older = values.whole("max_tokens", 1, _MOST_TOKENS)
    top, wanted = values.whole("top_logprobs", 0, MOST_LOGPROBS), values.flag("logprobs")
    if top and not wanted:
        raise bad_value("top_logprobs", "is given without 'logprobs': true")
    shared = _shared(values, most if most is not None else older, (top or 0) if wanted else None)
    return ChatAsked(**shared, schema=_schema(values), messages=_messages(body.get("messages")))


def completion_asked(body: Mapping[str, Any]) -> CompletionAsked:
    """A request for ``/v1/completions``.

    Raises:
        ProtocolError: a field that makes no sense.
    """
    check_fields(body, COMPLETION_FIELDS)
    values = Values(body)
    most = values.whole("max_tokens", 1, _MOST_TOKENS)
    shared = _shared(values, most or COMPLETION_TOKENS, values.whole("logprobs", 0, MOST_LOGPROBS))
    asked = CompletionAsked(**shared, prompts=_prompts(body.get("prompt")))
    if len(asked.prompts) * asked.n > MOST_CHOICES:
        raise bad_value(
            "n", f"times the prompts is {len(asked.prompts) * asked.n}, wanted up to {MOST_CHOICES}"
        )
    return asked


def _shared(values: Values, max_tokens: int | None, logprobs: int | None) -> dict[str, Any]:
    """The fields of both kinds of request."""
    model = values.text("model")
    if not model:
        raise ProtocolError(400, "you must provide a model parameter", param="model")
    stream, options = values.flag("stream"), values.table("stream_options")
    if options is not None and not stream:
        raise bad_value("stream_options", "is given without 'stream': true")
    seed, temperature = values.whole("seed", -(2**63), 2**64), values.number("temperature", 0, 2)
    return {
        "model": model,
        "stream": stream,
        "include_usage": bool(options) and Values(options or {}).flag("include_usage"),
        "n": values.whole("n", 1, MOST_CHOICES) or 1,
        "max_tokens": max_tokens,
        "stop": _stops(values.get("stop")),
        "seed": None if seed is None else seed % 2**32,
        "temperature": 1.0 if temperature is None else temperature,
        "settings": _settings(values),
        "logprobs": logprobs,
        "bias": _biases(values.table("logit_bias")),
    }


def _settings(values: Values) -> dict[str, float]:
    """The settings of samplers that change something."""
    found = {
        "repetition_penalty": values.number("repetition_penalty", 0.01, 100),
        "presence_penalty": values.number("presence_penalty", -2, 2) or None,
        "frequency_penalty": values.number("frequency_penalty", -2, 2) or None,
        "top_k": values.whole("top_k", -1, _MOST_TOKENS),
        "top_p": values.number("top_p", 0, 1),
        "min_p": values.number("min_p", 0, 1) or None,
    }
    if found["top_k"] in (0, -1):  # as others have it: all tokens
        found["top_k"] = None
    if found["top_p"] == 1:
        found["top_p"] = None
    elif found["top_p"] is not None:
        found["top_p"] = max(found["top_p"], 1e-9)  # the most likely token is always in it
    assert found.keys() == SETTINGS.keys()
    return {name: value for name, value in found.items() if value is not None}


def _stops(value: Any) -> tuple[str, ...]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise bad_value("stop", "must be a text, or a list of texts, of which none is empty")
    if len(found) > MOST_STOPS:
        raise bad_value("stop", f"has {len(found)} texts, wanted up to {MOST_STOPS}")
    if any(len(text) > MOST_STOP_LETTERS for text in found):
        raise bad_value("stop", f"has a text of more than {MOST_STOP_LETTERS} letters")
    return tuple(found)


def _biases(table: Mapping[str, Any] | None) -> dict[int, float]:
    found, values = {}, Values(table or {})
    if len(table or {}) > MOST_BIASES:
        raise bad_value("logit_bias", f"has more than {MOST_BIASES} tokens")
    for name in table or {}:
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise bad_value("logit_bias", f"has the key {name[:24]!r}, wanted a token id")
        try:
            found[int(name)] = values.number(name, -100, 100) or 0.0
        except ProtocolError as fault:
            raise bad_value("logit_bias", fault.message) from fault
    return found


def _schema(values: Values) -> str:
    """The schema that the answer is to hold to, as JSON; nothing for none."""
    wanted = values.table("response_format")
    kind = "text" if wanted is None else wanted.get("type")
    if kind == "text":
        return ""
    if kind == "json_object":
        return '{"type": "object"}'
    named = (wanted or {}).get("json_schema")
    if kind != "json_schema" or not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise bad_value(
            "response_format", "has no type of text, json_object, or json_schema with its 'schema'"
        )
    return json.dumps(named["schema"])


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A prompt or several, each a text or token ids."""
    if isinstance(value, str) or _are_ids(value):
        value = [value]
    if not isinstance(value, list) or not value or len(value) > MOST_CHOICES:
        raise bad_value("prompt", f"must be a text, token ids, or a list of 1 to {MOST_CHOICES} of them")
    if not all(isinstance(each, str) or _are_ids(each) for each in value):
        raise bad_value("prompt", "has something among its prompts that is neither text nor token ids")
    return tuple(each if isinstance(each, str) else tuple(each) for each in value)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    """Messages of role and text."""
    if not isinstance(value, list) or not value:
        raise bad_value("messages", "must be a list of messages, one at least")
    if len(value) > MOST_MESSAGES:
        raise bad_value("messages", f"has {len(value)} messages, wanted up to {MOST_MESSAGES}")
    return tuple(_message(each, f"messages[{place}]") for place, each in enumerate(value))


def _message(value: Any, where: str) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise bad_value(where, "is no object")
    role = value.get("role")
    if role not in _ROLES:
        raise bad_value(f"{where}.role", f"is {str(role)[:24]!r}, wanted one of {', '.join(_ROLES)}")
    known = ("role", "content", "name", "refusal", "annotations")
    other = next((name for name, each in value.items() if name not in known and each), None)
    if other is not None:
        raise ProtocolError(
            400,
            f"'{where}.{other}' is not served here",
            code="unsupported_parameter",
            param=f"{where}.{other}",
        )
    content = _content(value.get("content"), f"{where}.content")
    return {"role": "system" if role == "developer" else str(role), "content": content}


def _content(value: Any, where: str) -> str:
    """A text, or the parts of one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise bad_value(where, "must be a text, or a list of text parts")
    texts = [_part(part) for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise bad_value(where, "has a part that is no text, and this model reads nothing else")
    return "".join(map(str, texts))


def _part(value: Any) -> Any:
    """The text of a part of a message, or None."""
    return value.get("text") if isinstance(value, dict) and value.get("type") == "text" else None


def adapter_of(asked: Asked, base: str, adapters: Sequence[str]) -> str | None:
    """The adapter that a request names; None for the base.

    Raises:
        ProtocolError: there is no such model.
    """
    if asked.model == base:
        return None
    if asked.model in adapters:
        return asked.model
    raise ProtocolError(
        404, f"the model '{asked.model}' does not exist", code="model_not_found", param="model"
    )
