"""Conversations in the forms of Llama 2 and of Mistral.

Which of them a vocabulary has is read off its pieces: one with pieces of their own
for ``[INST]`` and ``[/INST]`` is Mistral's from its second version on, one with the
pieces of Mistral's first version is that, and any other is taken for Llama's.

Sources: Touvron et al. 2023, arXiv:2307.09288, and its reference code;
https://docs.mistral.ai/cookbooks/concept-deep-dive-tokenization-chat_templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mlxlora_core.api import DataError, Piece, listing

#: pieces around what a user says, and around a system message
ASK, ASKED = "[INST]", "[/INST]"
SYSTEM, SYSTEM_END = "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"


class Form(Enum):
    """How a conversation is written; the value is what people are told of it."""

    LLAMA_2 = "the form of Llama 2"
    MISTRAL_1 = "the form of Mistral's first version"
    MISTRAL_2 = "the form of Mistral's second and third version, with its control tokens"
    MISTRAL_7 = "the form of Mistral's seventh version, with its control tokens"


@dataclass(frozen=True)
class Vocabulary:
    """What a form needs of a tokenizer.

    Attributes:
        begin: the id that begins a text.
        end: the id that ends an answer.
        adds_space: whether a space is put in front of each text that is encoded.
        named: text -> id of the pieces that are no ordinary text.
        encode: ids of a text, without those that begin and end one.
    """

    begin: int
    end: int
    adds_space: bool
    named: Mapping[str, int]
    encode: Callable[[str], list[int]]


@dataclass(frozen=True)
class Conversation:
    """Messages, once they are found to be in order.

    Attributes:
        system: what comes before all, or nothing.
        turns: (prompt, answer) of each; the last answer is None where one is waited for.
    """

    system: str
    turns: Sequence[tuple[str, str | None]]


def read(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """A conversation in which user and assistant take turns, after an optional system message.

    Texts are taken as they are, white space at their ends included.

    Raises:
        DataError: roles that do not alternate, or calls of tools.
    """
    if any(message.get("tool_calls") for message in messages):
        raise DataError("messages call tools, and a form without a chat template has no calls of tools")
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    roles = [message["role"] for message in rest]
    if not rest or roles != (["user", "assistant"] * len(rest))[: len(rest)]:
        raise DataError(
            f"messages must alternate user, assistant after an optional system, got {listing(roles)}"
        )
    contents = [message["content"] for message in rest]
    answers = [*contents[1::2], *([None] if len(contents) % 2 else [])]
    return Conversation(system, list(zip(contents[::2], answers, strict=True)))


def pieces(form: Form, messages: Sequence[Mapping[str, Any]], vocabulary: Vocabulary) -> list[Piece]:
    """A conversation in ids; what a user says in one piece, what the assistant answers in the next.

    Raises:
        DataError: roles that do not alternate, or half a surrogate pair.
    """
    conversation = read(messages)
    if form is Form.LLAMA_2:
        return _llama_2(conversation, vocabulary)
    return _mistral(form, conversation, vocabulary)


def _llama_2(conversation: Conversation, vocabulary: Vocabulary) -> list[Piece]:
    """Each turn is a text of its own, between begin and end id."""
    system = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n" if conversation.system else ""
    found = []
    for prompt, answer in conversation.turns:
        asked = f"[INST] {system}{prompt} [/INST]"
        ids, system = vocabulary.encode(asked), ""
        found.append(Piece((vocabulary.begin, *ids), False))
        if answer is not None:
            said = _behind(ids, asked, f" {answer}", vocabulary)
            found.append(Piece((*said, vocabulary.end), True))
    return found


def _behind(ids: list[int], asked: str, answer: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of an answer, which begins with a space, behind those of its prompt.

    Both are encoded as one text, as they are read. A vocabulary that joins the end
    of the one and the beginning of the other in a piece gets them apart, or else
    generation could not be told what training was.
    """
    whole = vocabulary.encode(asked + answer)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    return vocabulary.encode(answer[1:] if vocabulary.adds_space else answer)


def _mistral(form: Form, conversation: Conversation, vocabulary: Vocabulary) -> list[Piece]:
    """All turns are one text, of which every part is encoded by itself.

    Up to the third version a system message stands in front of the first prompt: it
    is then before every answer that is trained.
    """
    begin, system, found = [vocabulary.begin], conversation.system, []
    if form is Form.MISTRAL_7 and system:
        named = vocabulary.named
        begin += [named[SYSTEM], *vocabulary.encode(system), named[SYSTEM_END]]
        system = ""
    for prompt, answer in conversation.turns:
        said = f"{system}\n\n{prompt}" if system else prompt
        found.append(Piece((*begin, *_question(form, said, vocabulary)), False))
        if answer is not None:
            found.append(Piece((*vocabulary.encode(answer), vocabulary.end), True))
        begin, system = [], ""
    return found


def _question(form: Form, said: str, vocabulary: Vocabulary) -> list[int]:
    """What a user says, between what begins and ends it."""
    if form is Form.MISTRAL_1:
        return vocabulary.encode(f"{ASK} {said} {ASKED}")
    return [vocabulary.named[ASK], *vocabulary.encode(said), vocabulary.named[ASKED]]
