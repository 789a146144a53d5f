"""Special tokens in texts: found where a chat template writes them, and letters where somebody else does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mlxlora_core.errors import DataError

# Characters that Unicode keeps free for the use of programs. Core takes others of them for its own marks.
_MARKS = tuple(map(chr, range(0xFDE0, 0xFDF0)))


@dataclass(frozen=True)
class SpecialToken:
    """A token that is no text.

    Attributes:
        id: its id.
        content: how it is written.
        lstrip: whether white space in front of it belongs to it.
        rstrip: whether white space behind it does.
        single_word: whether a place counts only where no letter or digit stands beside it.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class SpecialTexts:
    """How the special tokens of a vocabulary are written, and where they stand in a text."""

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def is_one(self, text: str) -> bool:
        """Whether a text is how a special token is written."""
        return text in self._tokens

    def parts(self, text: str) -> Iterator[str | int]:
        """The text between special tokens, and the ids of these, in order; no part is empty."""
        end = 0
        for found in self._pattern.finditer(text):
            token = self._tokens[found[0]]
            start, stop = found.span()
            if start < end or (token.single_word and _beside(text, start, stop)):
                continue
            before = text[end:start]
            before = before.rstrip() if token.lstrip else before
            if before:
                yield before
            yield token.id
            end = stop
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
        if text[end:]:
            yield text[end:]

    def cut(self, text: str) -> list[str]:
        """A text in parts, so that no special text is in one of them."""
        edges = [0, *(found.start() + 1 for found in self._pattern.finditer(text)), len(text)]
        return [text[start:stop] for start, stop in pairwise(edges)]

    def marked(self, value: Any, mark: str) -> Any:
        """``value`` with a mark inside every special text in it, so that :meth:`parts` finds none there."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: found[0][:1] + mark + found[0][1:], value)
        if isinstance(value, Mapping):
            return {key: self.marked(part, mark) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(part, mark) for part in value]
        return value


def free_mark(value: Any) -> str:
    """A character that stands in no text of ``value``.

    Raises:
        DataError: all of those that programs may use stand there.
    """
    texts = "".join(set("".join(_texts(value))) & set(_MARKS))
    free = [mark for mark in _MARKS if mark not in texts]
    if not free:
        raise DataError("the conversation holds all characters from U+FDE0 to U+FDEF, which are none")
    return free[0]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _beside(text: str, start: int, stop: int) -> bool:
    """Whether a letter or a digit stands beside a place in a text."""
    beside = text[max(0, start - 1) : start] + text[stop : stop + 1]
    return any(letter.isalnum() or letter == "_" for letter in beside)
