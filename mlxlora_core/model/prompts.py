"""What a model is asked, in token ids: the same for training and for generation.

A prompt is a text, or a conversation that waits for an answer. Its ids do not depend on what
follows. A tokenizer might join the end of a prompt and the beginning of its completion in one token
(``"A: "`` and ``"blue"``); the two are tokenized separately then, because when the prompt is asked
there is no completion yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlxlora_core.errors import DataError, UsageError, listing, one_line
from mlxlora_core.model.special_texts import special_texts
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.values import Tokenizer

#: a text, or messages, as of :meth:`mlxlora_core.api.Tokenizer.render`, that wait for an answer
Prompt = str | Sequence[Mapping[str, Any]]

# Texts to put before a completion, to find the ids that it has when it does not begin a text.
_BEFORE = ("\n", "x", ".", "0", "\u00e9", "A: ")


class Asking(Protocol):
    """How a text is asked."""

    def asked(self, text: str) -> Prompt:
        """The text itself, or a conversation of this one question."""


@dataclass(frozen=True)
class Continued:
    """A prompt and what follows it.

    Attributes:
        asked: the ids of the prompt, from :func:`prompt_ids`.
        answered: the ids that follow, including an end id.
        apart: whether the tokenizer would have joined the two.
    """

    asked: list[int]
    answered: list[int]
    apart: bool


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, tools: Sequence[Any] = ()) -> list[int]:
    """The ids of a prompt, with the begin id if there is one.

    Args:
        tokenizer: turns it into ids.
        prompt: text or messages.
        tools: that the assistant may call; for messages only.

    Raises:
        DataError: half a surrogate pair, or a conversation that the chat format cannot express or
            that does not wait for an answer.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    pieces = tokenizer.render(prompt, tools)
    if pieces[-1].answer:
        raise DataError("messages that are asked must not end with an answer")
    return [token for piece in pieces for token in piece.ids]


def checked(prompt: object, config: Asking) -> Prompt:
    """A prompt from whatever a caller passes.

    Args:
        prompt: a text or messages.
        config: how a text is asked.

    Raises:
        UsageError: it is neither text nor messages.
    """
    if isinstance(prompt, str):
        return config.asked(prompt)
    if isinstance(prompt, Sequence) and all(map(_is_message, prompt)):
        return prompt
    raise UsageError(
        f"prompt: wanted text, or messages of role and content, got {type(prompt).__name__}",
        fix="give one prompt at a time",
    )


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str) or bool(value.get("tool_calls"))


def words_on(tokenizer: CheckedTokenizer, prompt: Prompt) -> Iterator[str]:
    """A warning for each reason why a model may be told something else than the prompt says.

    Raises:
        DataError: half a surrogate pair.
    """
    texts = [prompt] if isinstance(prompt, str) else [message.get("content") or "" for message in prompt]
    special = {name for text in texts for name in special_texts(text, tokenizer.special_texts)}
    taken = {name for name in special if is_taken(tokenizer, name)}
    names, letters = (listing(map(one_line, sorted(found))) for found in (taken, special - taken))
    if taken:
        yield f"warning: {names} in the prompt is taken for the token of that name"
    if special - taken:
        chat = "; --chat asks in the form of the tokenizer" if isinstance(prompt, str) else ""
        yield f"warning: {letters} in the prompt is text: letters, and no token{chat}"
    if not all(reads_as(tokenizer, tokenizer.encode(text), text) for text in texts):
        yield "warning: the tokenizer lacks or changes characters of the prompt: it is told another text"


def reads_as(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> bool:
    """Whether decoding the ids of a text gives the text again.

    Without a begin id, a space that the tokenizer put in front of the text cannot be told from its own.
    """
    found = tokenizer.decode(ids)
    return found == text or (tokenizer.bos is None and found == f" {text}")


def is_taken(tokenizer: Tokenizer, special: str) -> bool:
    """Whether a text that is spelled like a special token becomes that token, and not its letters."""
    ids = tokenizer.encode(special, bos=False)
    return any(tokenizer.decode([token]).strip() == special for token in ids)


def continued(tokenizer: Tokenizer, prompt: str, completion: str) -> Continued:
    """The ids of a prompt and of the completion that follows it, including the end id.

    If the prompt keeps its ids in front of the completion, both are encoded as one text.

    Raises:
        DataError: half a surrogate pair.
    """
    asked = prompt_ids(tokenizer, prompt)
    whole = tokenizer.encode(prompt + completion, eos=True)
    if whole[: len(asked)] == asked:
        return Continued(asked, whole[len(asked) :], apart=False)
    wanted = (prompt + completion, tokenizer.decode(whole))
    found = list(_behind_others(tokenizer, completion))
    right = (ids for ids in found if tokenizer.decode([*asked, *ids]) in wanted)
    return Continued(asked, next(right, found[0]), apart=True)


def _behind_others(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Ids that a text may have after other texts, with the end id; finally those of the text by itself."""
    for before in _BEFORE:
        ids = tokenizer.encode(before, bos=False)
        both = tokenizer.encode(before + text, bos=False, eos=True)
        if both[: len(ids)] == ids:
            yield both[len(ids) :]
    yield tokenizer.encode(text, bos=False, eos=True)
