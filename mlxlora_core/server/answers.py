"""What the engine tells of a text, in the words of the protocol."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxlora_core.model.generate import STOP
from mlxlora_core.serving.request import Delta, Token, Usage
from mlxlora_core.values import Tokenizer

_LEAST_LOGPROB = -9999.0  # what the protocol has for a token that cannot come
_INCOMPLETE = "\ufffd"


class TokenTexts:
    """The text of single tokens.

    Args:
        tokenizer: whose tokens they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._known = tokenizer, dict[int, str]()

    def __call__(self, token: int) -> str:
        """Its text behind others; what is no whole character is U+FFFD."""
        if token not in self._known:
            self._known[token] = "".join(self._tokenizer.stream([token]))
        return self._known[token]


@dataclass
class Text:
    """One choice as it grows.

    Attributes:
        texts: of single tokens.
        text: so far.
        tokens: (where it begins, token), so far.
        finish: how it ended, as the protocol has it.
        usage: once it has ended.
    """

    texts: TokenTexts
    text: str = ""
    tokens: list[tuple[int, Token]] = field(default_factory=list)
    finish: str | None = None
    usage: Usage | None = None
    _place: int = 0

    def add(self, delta: Delta) -> list[tuple[int, Token]]:
        """Take a part, and give its tokens with their places; those of a stop text are left out."""
        self.text += delta.text
        found = []
        for token in delta.tokens:
            found.append((self._place, token))
            self._place += len(self.texts(token.id))
        if delta.finish == STOP:
            found = [(place, token) for place, token in found if place < len(self.text)]
        if delta.finish is not None:
            self.finish, self.usage = "stop" if delta.finish == STOP else "length", delta.usage
        self.tokens += found
        return found


class Form:
    """How answers of one endpoint look.

    Args:
        model: as the client has named it.
        texts: of single tokens.
        logprobs: whether log-probabilities are told.
    """

    prefix, name, part_name = "", "", ""

    def __init__(self, model: str, texts: TokenTexts, *, logprobs: bool) -> None:
        self.texts, self._logprobs = texts, logprobs
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Text], prompts: int) -> dict[str, Any]:
        """The answer as one document."""
        found = [
            {"index": index, **self._body(each.text), **self._end(each.finish, each.tokens)}
            for index, each in enumerate(choices)
        ]
        return {**self._head, "object": self.name, "choices": found, "usage": usage_of(choices, prompts)}

    def part(
        self, index: int, text: str | None, tokens: Sequence[tuple[int, Token]], finish: str | None
    ) -> dict[str, Any]:
        """A part of a choice; without text, where there is only its end to tell."""
        choice = {"index": index, **self._piece(text), **self._end(finish, tokens)}
        return {**self._head, "object": self.part_name, "choices": [choice]}

    def begin(self, index: int) -> dict[str, Any] | None:
        """What comes before the first part of a choice; None for nothing."""
        return None

    def told(self, choices: Sequence[Text], prompts: int) -> dict[str, Any]:
        """The part that tells the usage."""
        return {**self._head, "object": self.part_name, "choices": [], "usage": usage_of(choices, prompts)}

    def _body(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _piece(self, text: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _table(self, tokens: Sequence[tuple[int, Token]]) -> dict[str, Any]:
        raise NotImplementedError

    def _end(self, finish: str | None, tokens: Sequence[tuple[int, Token]]) -> dict[str, Any]:
        told = self._table(tokens) if self._logprobs and (tokens or finish is None) else None
        return {"logprobs": told, "finish_reason": finish}


class ChatForm(Form):
    """Answers of ``/v1/chat/completions``."""

    prefix, name, part_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, index: int) -> dict[str, Any]:
        """The part that says who speaks."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, **self._end(None, ())}
        return {**self._head, "object": self.part_name, "choices": [{**choice, "logprobs": None}]}

    def _body(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def _table(self, tokens: Sequence[tuple[int, Token]]) -> dict[str, Any]:
        found = [
            {
                **self._described(token.id, token.logprob),
                "top_logprobs": [self._described(*each) for each in token.top],
            }
            for _, token in tokens
        ]
        return {"content": found, "refusal": None}

    def _described(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.texts(token)
        whole = None if _INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": whole}


class CompletionForm(Form):
    """Answers of ``/v1/completions``."""

    prefix, name, part_name = "cmpl", "text_completion", "text_completion"

    def _body(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def _table(self, tokens: Sequence[tuple[int, Token]]) -> dict[str, Any]:
        return {
            "tokens": [self.texts(token.id) for _, token in tokens],
            "token_logprobs": [_finite(token.logprob) for _, token in tokens],
            "top_logprobs": [
                {self.texts(other): _finite(logprob) for other, logprob in reversed(token.top)}
                for _, token in tokens
            ],
            "text_offset": [place for place, _ in tokens],
        }


def usage_of(choices: Sequence[Text], prompts: int) -> Mapping[str, Any]:
    """What an answer took; each prompt counts once.

    Args:
        choices: of all prompts, those of the first one first.
        prompts: how many there were.
    """
    each = max(1, len(choices) // max(prompts, 1))
    first = [choice.usage for choice in choices[::each] if choice.usage is not None]
    drawn = sum(choice.usage.completion_tokens for choice in choices if choice.usage is not None)
    asked = sum(usage.prompt_tokens for usage in first)
    return {
        "prompt_tokens": asked,
        "completion_tokens": drawn,
        "total_tokens": asked + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in first)},
    }


def _finite(logprob: float | None) -> float:
    return _LEAST_LOGPROB if logprob is None or logprob < _LEAST_LOGPROB else logprob
