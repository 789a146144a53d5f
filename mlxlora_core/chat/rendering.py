"""A conversation in token ids, by a chat template and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mlxlora_core.chat.special_tokens import SpecialTexts, free_mark
from mlxlora_core.chat.template import ChatTemplate
from mlxlora_core.errors import DataError, ModelError
from mlxlora_core.values import Piece


class Behind(Enum):
    """What a part of a text stands behind, by which a tokenizer may put a space in front of it."""

    NOTHING = "nothing"
    SPECIAL = "a special token"
    TEXT = "other text"


@dataclass(frozen=True)
class Renderer:
    """What writes conversations in token ids.

    Attributes:
        template: what they look like.
        special: the special tokens of the tokenizer.
        encode: the ids of a part of a text in which nothing is a special token.
    """

    template: ChatTemplate
    special: SpecialTexts
    encode: Callable[[str, Behind], list[int]]

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[Piece]:
        """A conversation in pieces; see :meth:`mlxlora_core.values.Tokenizer.render`.

        What is written as a special token is one where the template writes it, and
        letters in what people and the model say.

        Raises:
            DataError: no message, half a surrogate pair, or the template refuses the conversation.
            ModelError: the template is none.
            SafetyError: it reaches for what it must not, or wants to loop or write without end.
        """
        if not messages:
            raise DataError("there is no message")
        refuse_halves(json.dumps([messages, tools], ensure_ascii=False, default=str))
        mark = free_mark([messages, tools])
        said, offered = (self.special.marked(value, mark) for value in (messages, tools))
        pieces, before = [], ""
        for turn in self.template.turns(said, offered, self.special.is_one):
            pieces.append(Piece(tuple(self._behind(before, turn.text, mark)), turn.answer))
            before = turn.text
        return pieces

    def _behind(self, before: str, text: str, mark: str) -> list[int]:
        """The ids of a turn behind those of the turn before it.

        Both are encoded as one text, as they are read. Where a token would join the end
        of the one and the beginning of the other they are apart, since generation is
        told the turn before alone.
        """
        if not before:
            return self._written(text, mark, Behind.NOTHING)
        front = self._written(before, mark, Behind.NOTHING)
        whole = self._written(before + text, mark, Behind.NOTHING)
        if whole[: len(front)] == front:
            return whole[len(front) :]
        return self._written(text, mark, Behind.TEXT)

    def _written(self, text: str, mark: str, behind: Behind) -> list[int]:
        """The ids of what a template has written, special tokens among them."""
        ids: list[int] = []
        for part in self.special.parts(text):
            if isinstance(part, int):
                ids.append(part)
                behind = Behind.SPECIAL
            else:
                ids += self.encode(part.replace(mark, ""), behind)
        return ids


def turn_end_ids(template: ChatTemplate | None, find: Callable[[str], int | None]) -> list[int]:
    """The ids of the tokens by which a template ends what the assistant says.

    Args:
        template: of conversations, if there is one. What is none ends nothing: texts need
            no template, and conversations tell what is wrong with it.
        find: the id of the token that is written so, or None.

    Raises:
        SafetyError: it reaches for what it must not, or wants to loop or write without end.
    """
    try:
        texts = () if template is None else template.turn_ends(lambda text: find(text) is not None)
    except ModelError:
        return []
    return [number for text in texts if (number := find(text)) is not None]


def template_warning(template: ChatTemplate | None, find: Callable[[str], int | None]) -> str:
    """What speaks against training on conversations of a template, or nothing.

    Args:
        template: of conversations, if there is one.
        find: the id of the token that is written so, or None.

    Raises:
        SafetyError: it reaches for what it must not, or wants to loop or write without end.
    """
    try:
        return "" if template is None else template.warning(lambda text: find(text) is not None)
    except ModelError:  # conversations tell what is wrong with it
        return ""


def refuse_halves(text: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer has a token for.

    Raises:
        DataError: with its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise DataError(
            f"character {fault.start + 1} of the text is {text[fault.start]!r}, half a surrogate pair",
            fix="write the text in valid UTF-8",
        ) from fault
