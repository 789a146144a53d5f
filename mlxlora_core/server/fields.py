"""The fields of the protocol's requests: which are served, and what is done with the others.

``docs/serving.md`` has these lists, and the tests hold them against the official client's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxlora_core.errors import nearest
from mlxlora_core.server.faults import ProtocolError

SERVED, IGNORED, REFUSED = "served", "ignored", "refused"


@dataclass(frozen=True)
class Field:
    """A field of a request.

    Attributes:
        how: ``served``; ``ignored``: it may be anything; ``refused``: only null and what changes nothing.
        note: what there is to know of it.
        neutral: values that change nothing, and are taken though it is refused.
    """

    how: str
    note: str = ""
    neutral: tuple[Any, ...] = ()

    @property
    def words(self) -> str:
        """The note, with the values that are taken though it is refused."""
        taken = ", ".join(f"`{json.dumps(value)}`" for value in self.neutral)
        return "; ".join(filter(None, (self.note, taken and f"taken: {taken}")))


_NO_TOOLS = "the model's answer is text"

_SHARED = {
    "model": Field(SERVED, "the base or an adapter, by its name in `/v1/models`"),
    "stream": Field(SERVED, "server-sent events"),
    "stream_options": Field(SERVED, "`include_usage`; `include_obfuscation` is ignored"),
    "n": Field(SERVED, "1 to 16; choice *i* is drawn with `seed` + *i*"),
    "stop": Field(SERVED, "a text or up to 16, each of up to 4096 letters, none of which comes"),
    "seed": Field(
        SERVED, "0 to 2**32 - 1, others by their remainder; chosen at random where it is not given"
    ),
    "temperature": Field(SERVED, "0 to 2; 0 is the most likely token"),
    "top_p": Field(SERVED, "0 to 1"),
    "top_k": Field(SERVED, "not of the protocol: only the so many most likely tokens"),
    "min_p": Field(SERVED, "not of the protocol: only tokens with this share of the highest probability"),
    "repetition_penalty": Field(SERVED, "not of the protocol: divides the logits of tokens that came before"),
    "presence_penalty": Field(SERVED, "-2 to 2; tokens of the prompt count as well"),
    "frequency_penalty": Field(SERVED, "-2 to 2; tokens of the prompt count as well"),
    "logit_bias": Field(SERVED, "token id -> -100 to 100, for up to 1024 tokens"),
    "user": Field(IGNORED),
}

#: of ``/v1/chat/completions``
CHAT_FIELDS: Mapping[str, Field] = {
    "messages": Field(
        SERVED,
        "up to 1024; text of system, developer (as system), user and assistant, in the model's template",
    ),
    **_SHARED,
    "max_completion_tokens": Field(SERVED, "`--max-tokens` of the server where it is not given"),
    "max_tokens": Field(SERVED, "the older name of `max_completion_tokens`"),
    "logprobs": Field(SERVED),
    "top_logprobs": Field(SERVED, "0 to 20"),
    "response_format": Field(SERVED, "`text`, `json_object` and `json_schema`"),
    "metadata": Field(IGNORED),
    "moderation": Field(IGNORED),
    "parallel_tool_calls": Field(IGNORED),
    "prompt_cache_key": Field(IGNORED, "beginnings of prompts are kept whatever it is"),
    "prompt_cache_options": Field(IGNORED),
    "prompt_cache_retention": Field(IGNORED),
    "safety_identifier": Field(IGNORED),
    "service_tier": Field(IGNORED),
    "store": Field(REFUSED, "nothing is stored", (False,)),
    "audio": Field(REFUSED, _NO_TOOLS),
    "modalities": Field(REFUSED, "text only", (["text"],)),
    "prediction": Field(REFUSED),
    "reasoning_effort": Field(REFUSED, "", ("none",)),
    "verbosity": Field(REFUSED, "", ("medium",)),
    "tools": Field(REFUSED, _NO_TOOLS, ([],)),
    "tool_choice": Field(REFUSED, _NO_TOOLS, ("none", "auto")),
    "functions": Field(REFUSED, _NO_TOOLS, ([],)),
    "function_call": Field(REFUSED, _NO_TOOLS, ("none", "auto")),
    "web_search_options": Field(REFUSED),
}

#: of ``/v1/completions``
COMPLETION_FIELDS: Mapping[str, Field] = {
    "prompt": Field(SERVED, "a text, token ids, or a list of up to 16 of them"),
    **_SHARED,
    "max_tokens": Field(SERVED, "16 where it is not given, as the protocol has it"),
    "logprobs": Field(SERVED, "0 to 20"),
    "best_of": Field(REFUSED, "`n` is served", (1,)),
    "echo": Field(REFUSED, "", (False,)),
    "suffix": Field(REFUSED, "", ("",)),
}


def check_fields(body: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Refuse what is no field of a request, and fields that are not served.

    Raises:
        ProtocolError: with the field.
    """
    for name, value in body.items():
        field = fields.get(name)
        if field is None:
            hint = nearest(name, fields)
            raise ProtocolError(
                400, f"unknown parameter: '{name}' {hint}".rstrip(), code="unknown_parameter", param=name
            )
        if field.how == REFUSED and value is not None and value not in field.neutral:
            raise ProtocolError(400, f"'{name}' is not served here", code="unsupported_parameter", param=name)
