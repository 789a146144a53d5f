"""Which parts of a rendered conversation the assistant says: found for certain, or refused.

A template may mark them itself by ``{% generation %}``. Elsewhere an answer begins where
the conversation before it ends once its answer is waited for, if that is how the whole
begins too; some templates write past turns in another way than the last one, and there an
answer begins where its own content does. It ends with the token that ends its turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlxlora_core.chat.places import Place, places
from mlxlora_core.errors import DataError

Messages = Sequence[Mapping[str, Any]]

# Characters that Unicode keeps free for use inside programs: no text has them.
_BEGIN, _END = "\ufdd4", "\ufdd5"
_MARK = re.compile(f"[{_BEGIN}{_END}]")
_SHAPE = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]")  # how tokens are spelt that end a turn

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


class Renders(Protocol):
    """What is needed of a template."""

    @property
    def specials(self) -> Mapping[str, str]:
        """Name -> text of its special tokens."""

    @property
    def where(self) -> str:
        """The file that it stands in."""

    @property
    def has_generation(self) -> bool:
        """Whether it marks answers itself."""

    def marked(
        self, messages: Messages, tools: Sequence[Any], add_generation_prompt: bool, marks: tuple[str, str]
    ) -> str:
        """The text of a conversation."""


@dataclass
class _Rendering:
    """A conversation that is being looked through.

    Attributes:
        template: renders it.
        messages: the conversation.
        tools: that the assistant has.
        ends: texts that end a turn.
        whole: its text.
    """

    template: Renders
    messages: Messages
    tools: Sequence[Any]
    ends: tuple[str, ...]
    whole: str = ""
    _places: Mapping[int, Place] | None = None

    def text(self, count: int, waits: bool) -> str | None:
        """The first messages as text, or None where the template refuses them."""
        try:
            return self.template.marked(self.messages[:count], self.tools, waits, ("", ""))
        except DataError:
            return None

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
    template: Renders, messages: Messages, tools: Sequence[Any], ends: tuple[str, ...]
) -> list[Turn]:
    """The text of a conversation in turns; see :meth:`mlxlora_core.chat.ChatTemplate.turns`.

    Args:
        template: renders it.
        messages: the conversation.
        tools: that the assistant has.
        ends: texts that end a turn of the assistant.

    Raises:
        DataError: the template refuses the conversation, or it cannot be told which part the assistant says.
    """
    rendering = _Rendering(template, messages, tools, ends)
    rendering.whole = template.marked(messages, tools, waits(messages), ("", ""))
    said = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    spans = _marked_spans(rendering) if said and template.has_generation else []
    if len(spans) < len(said):
        spans = _searched_spans(rendering, said)
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
    """What ``{% generation %}`` holds, without white space behind the end of a turn."""
    messages, tools = rendering.messages, rendering.tools
    text = rendering.template.marked(messages, tools, waits(messages), (_BEGIN, _END))
    if _MARK.sub("", text) != rendering.whole:
        return []
    spans, at, open_at = [], 0, None
    for part in re.split(f"([{_BEGIN}{_END}])", text):
        if part == _BEGIN and open_at is None:
            open_at = at
        elif part == _END and open_at is not None:
            spans.append((open_at, _cut(rendering, open_at, at)))
            open_at = None
        elif _MARK.match(part):
            return []  # one in another
        else:
            at += len(part)
    return spans


def _cut(rendering: _Rendering, begin: int, end: int) -> int:
    """The end of an answer without the white space behind the token that ends its turn."""
    text = rendering.whole[begin:end].rstrip()
    return begin + len(text) if text.endswith(rendering.ends or ("\0",)) else end


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
    begin = place[0] if place else _behind_header(rendering, number, prompt)
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
    begins = [match.start() for match in _SHAPE.finditer(prompt, len(before)) if match.start() > len(before)]
    return next((at for at in reversed(begins) if rendering.whole.startswith(prompt[:at])), None)


def _end(rendering: _Rendering, number: int, begin: int) -> int:
    """Where the answer in a message ends that begins at ``begin``."""
    last = number == len(rendering.messages) - 1
    whole = rendering.whole
    text = whole if last else rendering.text(number + 1, False)
    if text is not None:
        found = [text.rfind(end, begin) + len(end) for end in rendering.ends if end in text[begin:]]
        stop = max(found) if found else begin + len(text[begin:].rstrip())
        if begin <= stop and whole.startswith(text[:stop]):
            return stop
    place = rendering.place(number)
    own = repr({key: value for key, value in rendering.messages[number].items() if key != "content"})
    after = place[1] if place else begin
    calls = bool(rendering.messages[number].get("tool_calls"))
    found = [whole.find(end, after) + len(end) for end in rendering.ends if end in whole[after:]]
    if (place is None and not calls) or any(end in own for end in rendering.ends):
        raise _unclear(rendering, number, "ends")
    if found:
        return min(found)
    if calls:
        raise _unclear(rendering, number, "ends")
    return after


def _unclear(rendering: _Rendering, number: int, what: str) -> DataError:
    return DataError(
        f"it cannot be told where the answer in message {number + 1} {what} in what the chat template writes",
        where=rendering.template.where,
        fix=_FIX,
    )


# --- the end of a turn ---------------------------------------------------------

_ASKED, _ANSWERED = ("Question 17.", "Question 23."), ("Answer 17.", "Answer 23.")


def find_turn_ends(template: Renders, is_special: Callable[[str], bool] | None) -> tuple[str, ...]:
    """The texts by which a template ends turns of the assistant; see ``ChatTemplate.turn_ends``.

    Args:
        template: asked for two short conversations.
        is_special: whether a text is a token that is no ordinary text.

    Raises:
        ModelError: it is no template.
        SafetyError: it reaches for what it must not.
    """
    tails = []
    for count in (1, 2):
        tail = _tail(template, count, parts=False) or _tail(template, count, parts=True)
        if tail is not None:
            tails.append(tail)
    if len(tails) == 2:
        same = _same_start(*tails)
        if found := _first_special(template, same, is_special):
            return (found,)
    found_in = [_first_special(template, tail, is_special) for tail in tails]
    return tuple(dict.fromkeys(text for text in found_in if text))


def _tail(template: Renders, count: int, *, parts: bool) -> str | None:
    """What stands behind the first answer of a conversation of so many, up to the next question."""
    messages: list[dict[str, Any]] = []
    for asked, answered in list(zip(_ASKED, _ANSWERED, strict=True))[:count]:
        for role, text in (("user", asked), ("assistant", answered)):
            messages.append({"role": role, "content": [{"type": "text", "text": text}] if parts else text})
    try:
        whole = template.marked(messages, (), False, ("", ""))
    except DataError:
        return None
    head, found, tail = whole.partition(_ANSWERED[0])
    return tail.partition(_ASKED[1])[0] if found and _ASKED[0] in head else None


def _same_start(one: str, other: str) -> str:
    """How two texts begin alike."""
    size = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if size is None else size]


def _first_special(template: Renders, text: str, is_special: Callable[[str], bool] | None) -> str:
    """The first text of a token that is no ordinary text, or nothing."""
    found = {match.start(): match[0] for match in _SHAPE.finditer(text)}
    for special in template.specials.values():
        if special.strip() and special in text:
            found.setdefault(text.find(special), special)
    return next((spelt for _, spelt in sorted(found.items()) if is_special is None or is_special(spelt)), "")
