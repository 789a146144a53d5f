"""Which parts of a rendered conversation the assistant says: found for certain, or refused.

A template may mark them itself by ``{% generation %}``. Elsewhere an answer begins where
the conversation before it ends once its answer is waited for, if that is how the whole
begins too; some templates write past turns in another way than the last one, and there an
answer begins where its own content does. It ends with the token that ends its turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from mlxlora_core.chat.beginnings import Beginnings, KnownBeginnings
from mlxlora_core.chat.places import Place, places
from mlxlora_core.chat.turn_ends import SHAPE, Messages, Renders
from mlxlora_core.errors import DataError

# Characters that Unicode keeps free for use inside programs: no text has them.
_BEGIN, _END = "\ufdd4", "\ufdd5"
_MARK = re.compile(f"[{_BEGIN}{_END}]")
_TOKEN_AND_SPACE = re.compile(rf"(?:{SHAPE.pattern})\s*")

_FIX = "mark it in the template by {% generation %}, or use another chat template"


@dataclass(frozen=True)
class Turn:
    """A part of a conversation as text.

    Attributes:
        text: the part.
        answer: whether it is what the assistant says, the token that ends its turn included.
    """

    text: str
    answer: bool


@dataclass
class _Rendering:
    """A conversation that is being looked through.

    Attributes:
        template: renders it.
        messages: the conversation.
        tools: that the assistant has.
        ends: texts that end a turn.
        beginnings: of its text.
    """

    template: Renders
    messages: Messages
    tools: Sequence[Any]
    ends: tuple[str, ...]
    beginnings: Beginnings
    _places: Mapping[int, Place] | None = None

    @property
    def whole(self) -> str:
        """Its text."""
        return self.beginnings.whole

    def text(self, count: int, waits: bool) -> str | None:
        """The first messages as text, or None where the template refuses them."""

        def rendered() -> str | None:
            try:
                return self.template.marked(self.messages[:count], self.tools, waits, ("", ""))
            except DataError:
                return None

        return self.beginnings.text(count, waits, rendered)

    def place(self, number: int) -> Place | None:
        """Where the content of a message stands in the whole, if that is certain."""
        if self._places is None:
            self._places = places(self.messages, self.whole, self._again)
        return self._places.get(number)

    def _again(self, messages: Messages) -> str:
        return self.template.marked(messages, self.tools, waits(messages), ("", ""))


def waits(messages: Messages) -> bool:
    """Whether a conversation waits for an answer."""
    return not messages or messages[-1].get("role") != "assistant"


def find_turns(
    template: Renders,
    messages: Messages,
    tools: Sequence[Any],
    ends: tuple[str, ...],
    known: KnownBeginnings,
) -> list[Turn]:
    """The text of a conversation in turns; see :meth:`mlxlora_core.chat.ChatTemplate.turns`.

    Args:
        template: renders it.
        messages: the conversation.
        tools: that the assistant has.
        ends: texts that end a turn of the assistant.
        known: what the template has made of conversations before.

    Raises:
        DataError: the template refuses the conversation, or it cannot be told which part the assistant says.
    """
    whole = template.marked(messages, tools, waits(messages), ("", ""))
    rendering = _Rendering(template, messages, tools, ends, known.of(messages, tools, whole))
    said = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    spans = _marked_spans(rendering) if said and template.has_generation else []
    marked = len(spans) >= len(said)
    spans = _inside(rendering, said, spans) if marked else _searched_spans(rendering, said)
    return list(_turns(rendering.whole, spans, waits(messages)))


def _turns(whole: str, spans: Sequence[Place], to_the_end: bool) -> Iterator[Turn]:
    """A text in turns, of which the assistant's are these."""
    at = 0
    for begin, end in spans:
        if at < begin:
            yield Turn(whole[at:begin], False)
        if begin < end:
            yield Turn(whole[begin:end], True)
        at = end
    if not spans or (to_the_end and at < len(whole)):
        yield Turn(whole[at:], False)


def _marked_spans(rendering: _Rendering) -> list[Place]:
    """What ``{% generation %}`` holds; nothing where the marks change the text."""
    messages, tools = rendering.messages, rendering.tools
    text = rendering.template.marked(messages, tools, waits(messages), (_BEGIN, _END))
    if _MARK.sub("", text) != rendering.whole:
        return []
    spans, at, open_at = [], 0, None
    for part in re.split(f"([{_BEGIN}{_END}])", text):
        if part == _BEGIN and open_at is None:
            open_at = at
        elif part == _END and open_at is not None:
            spans.append((open_at, at))
            open_at = None
        elif _MARK.match(part):
            return []  # one in another
        else:
            at += len(part)
    return spans


def _inside(rendering: _Rendering, said: Sequence[int], spans: Sequence[Place]) -> list[Place]:
    """Spans without what generation writes before an answer, and without white space behind its end."""
    prompts = [rendering.text(number, True) for number in said]
    asked = [len(prompt) for prompt in prompts if prompt is not None and rendering.whole.startswith(prompt)]
    found = []
    for begin, end in spans:
        begin = max([begin, *(at for at in asked if at <= end)])
        text = rendering.whole[begin:end].rstrip()
        found.append((begin, begin + len(text) if text.endswith(rendering.ends or ("\0",)) else end))
    return found


def _searched_spans(rendering: _Rendering, said: Sequence[int]) -> list[Place]:
    """Where each answer begins and ends."""
    spans: list[Place] = []
    at = 0
    for number in said:
        begin = _begin(rendering, number, at)
        end = _end(rendering, number, begin)
        spans.append((begin, end))
        at = end
    return spans


def _begin(rendering: _Rendering, number: int, at: int) -> int:
    """Where the answer in a message begins, behind ``at``."""
    prompt, place = rendering.text(number, True), None
    if prompt is not None and at <= len(prompt) and rendering.whole.startswith(prompt):
        return len(prompt)
    place = rendering.place(number)
    silent = not rendering.messages[number].get("content")
    begin = place[0] if place else _behind_header(rendering, number, prompt) if silent else None
    if begin is None or begin < at:
        raise _unclear(rendering, number, "begins")
    return begin


def _behind_header(rendering: _Rendering, number: int, prompt: str | None) -> int | None:
    """The end of what a template writes before an answer, without the thought that a prompt opens.

    Args:
        rendering: the conversation.
        number: of the message, which has no content to look for but calls tools.
        prompt: the text up to it, with the beginning of an answer.
    """
    before = rendering.text(number, False)
    if before is None or prompt is None or not prompt.startswith(before):
        return None
    edges = {edge for match in _TOKEN_AND_SPACE.finditer(prompt, len(before)) for edge in match.span()}
    edges -= {len(before)}
    return next((at for at in sorted(edges, reverse=True) if rendering.whole.startswith(prompt[:at])), None)


def _end(rendering: _Rendering, number: int, begin: int) -> int:
    """Where the answer in a message ends that begins at ``begin``."""
    whole, ends = rendering.whole, rendering.ends
    text = whole if number == len(rendering.messages) - 1 else rendering.text(number + 1, False)
    if text is not None:
        found = [text.rfind(end, begin) + len(end) for end in ends if end in text[begin:]]
        stop = max(found) if found else begin + len(text[begin:].rstrip())
        if begin <= stop and whole.startswith(text[:stop]):
            # Some templates write the end of a turn once there is a next one.
            late = [len(end) for end in ends if not found and whole.startswith(end, stop)]
            return stop + max(late, default=0)
    first = _first_end(rendering, number, begin)
    if first is None:
        raise _unclear(rendering, number, "ends")
    return first


def _first_end(rendering: _Rendering, number: int, begin: int) -> int | None:
    """The end of the first turn behind the content of a message, where that is certain."""
    whole, ends, place = rendering.whole, rendering.ends, rendering.place(number)
    message, following = rendering.messages[number], rendering.messages[number + 1 :]
    calls = bool(message.get("tool_calls"))
    own = repr({key: value for key, value in message.items() if key != "content"})
    if (place is None and not calls) or any(end in own for end in ends):
        return None
    after = place[1] if place else begin
    found = [whole.find(end, after) + len(end) for end in ends if end in whole[after:]]
    if not found:
        return None if calls else after
    others = map(_content, takewhile(lambda message: message.get("role") != "assistant", following))
    tail = whole[after : min(found)]
    return None if any(content and content in tail for content in others) else min(found)


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, without white space at its ends."""
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _unclear(rendering: _Rendering, number: int, what: str) -> DataError:
    return DataError(
        f"it cannot be told where the answer in message {number + 1} {what} in what the chat template writes",
        where=rendering.template.where,
        fix=_FIX,
    )
