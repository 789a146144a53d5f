"""Where the answers of a conversation stand in its text, found by putting marks around them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlxlora_core.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Place = tuple[int, int]  #: where a part of a text begins and ends

# Characters that Unicode keeps free for use inside programs, with the number of the message between them.
_BEGIN, _END, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_MARK = re.compile(f"([{_BEGIN}{_END}])([0-9]+){_CLOSE}")
_THOUGHT = "</think>"  # templates cut off what stands up to it


def places(messages: Messages, whole: str, render: Callable[[Messages], str]) -> dict[int, Place]:
    """Number of a message of the assistant -> where its content stands, without white space at its ends.

    Marks are put around each content; where they change nothing else in the text, they
    tell the place. Where they do, a content that stands in the text once stands there.

    Args:
        messages: a conversation.
        whole: its text.
        render: conversation -> text.
    """
    contents = {
        number: text
        for number, message in enumerate(messages)
        if message.get("role") == "assistant" and (text := _text(message.get("content"))).strip()
    }
    found: dict[int, Place] = {}
    for behind_thought in (False, True):
        marked = [
            {**message, "content": _marked(contents[number], number, behind_thought)}
            if number in contents
            else message
            for number, message in enumerate(messages)
        ]
        try:
            text = render(marked)
        except DataError:
            continue
        if _MARK.sub("", text) == whole:
            found |= _read(text)
        if found.keys() == contents.keys():
            return found
    return dict(_single(whole, contents)) | found


def _text(content: Any) -> str:
    """The text of a message that is one text."""
    return content if isinstance(content, str) else ""


def _marked(content: str, number: int, behind_thought: bool) -> str:
    """A content with marks around it, or around what stands behind the thought in it."""
    thought, found, rest = content.rpartition(_THOUGHT)
    head, body = (thought + found, rest) if behind_thought else ("", content)
    core = body.strip()
    lead, _, trail = body.partition(core) if core else (body, "", "")
    return f"{head}{lead}{_BEGIN}{number}{_CLOSE}{core}{_END}{number}{_CLOSE}{trail}"


def _read(text: str) -> Iterator[tuple[int, Place]]:
    """(number, place) of each pair of marks in a text, places as they are without marks."""
    removed, found = 0, defaultdict[int, list[tuple[str, int]]](list)
    for mark in _MARK.finditer(text):
        found[int(mark[2])].append((mark[1], mark.start() - removed))
        removed += len(mark[0])
    for number, marks in found.items():
        if [mark for mark, _ in marks] == [
            _BEGIN,
            _END,
        ]:  # of a text that is there twice, which one is meant?
            yield number, (marks[0][1], marks[1][1])


def _single(whole: str, contents: Mapping[int, str]) -> Iterator[tuple[int, Place]]:
    """(number, place) of each content that stands in a text once."""
    for number, content in contents.items():
        text = content.rpartition(_THOUGHT)[2].strip() or content.strip()
        if whole.count(text) == 1:
            yield number, (whole.index(text), whole.index(text) + len(text))
