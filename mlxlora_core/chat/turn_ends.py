"""The token by which a template ends a turn of the assistant: found by asking for two short conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlxlora_core.errors import DataError

Messages = Sequence[Mapping[str, Any]]
IsSpecial = Callable[[str], bool]

#: how tokens are spelt that begin and end turns
SHAPE = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]")

_ASKED, _ANSWERED = ("Question 17.", "Question 23."), ("Answer 17.", "Answer 23.")
_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
_ODD, _SPACE = re.compile(r"[^\w\s]"), re.compile(r"\s")
_MOST_LETTERS = 60  # of a special token


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


def find_turn_ends(template: Renders, is_special: IsSpecial | None) -> tuple[str, ...]:
    """The texts by which a template ends turns of the assistant; see ``ChatTemplate.turn_ends``.

    Args:
        template: asked for two short conversations.
        is_special: whether a text is a token that is no ordinary text.

    Raises:
        ModelError: it is no template.
        SafetyError: it reaches for what it must not.
    """
    probe = _probe(template)
    return probe.ends(is_special) if probe else ()


def find_warning(template: Renders, ends: tuple[str, ...]) -> str:
    """What speaks against training on a template's turns, or nothing; see ``ChatTemplate.warning``.

    Args:
        template: asked for a short conversation.
        ends: the texts by which it ends turns.

    Raises:
        ModelError: it is no template.
        SafetyError: it reaches for what it must not.
    """
    probe = _probe(template)
    if not ends and probe:
        return "it writes no token that ends an answer"
    if probe and not any(end in probe.last for end in ends):
        return "it writes no token behind the last answer of a conversation"
    return ""


@dataclass(frozen=True)
class _Probe:
    """What a template writes in a conversation of one question, and of two.

    Attributes:
        template: that writes it.
        head: what stands before the first question.
        last: what stands behind the last answer.
        middle: what stands between an answer and the next question.
        begin: what begins an answer, and so ends none.
    """

    template: Renders
    head: str
    last: str
    middle: str
    begin: str

    def ends(self, is_special: IsSpecial | None) -> tuple[str, ...]:
        """The texts that end a turn."""
        same = self.last[: _same(self.last, self.middle)]
        begins = set(self._specials(self.begin, is_special))
        ends = [spelt for spelt in self._specials(same, is_special) if spelt not in begins]
        if ends:
            return (ends[-1],)
        if not self.last and self.head.endswith(self.middle):
            return ()  # what stands in the middle begins a question
        firsts = (next(self._specials(part, is_special), "") for part in (self.last, self.middle))
        return tuple(dict.fromkeys(spelt for spelt in firsts if spelt and spelt not in begins))

    def _specials(self, text: str, is_special: IsSpecial | None) -> Iterator[str]:
        """The tokens in a text that are no ordinary text, in order."""
        known = {special for special in self.template.specials.values() if special.strip()}
        at = 0
        while at < len(text):
            if is_special is None:
                shape = SHAPE.match(text, at)
                spelt = shape[0] if shape else next((s for s in known if text.startswith(s, at)), "")
            else:  # words and white space are tokens, too, but end no turn
                sizes = range(_MOST_LETTERS, 2, -1) if _ODD.match(text, at) else ()
                parts = (text[at : at + size] for size in sizes)
                spelt = next((part for part in parts if not _SPACE.search(part) and is_special(part)), "")
            if spelt:
                yield spelt
            at += len(spelt) or 1


def _probe(template: Renders) -> _Probe | None:
    """What a template writes of the first conversation that it takes: some need parts of text, or tools."""
    for tools in ((), (_TOOL,)):
        for parts in (False, True):
            texts = [_rendered(template, _talk(count, parts), tools) for count in (1, 2)]
            around = [_around(text) for text in texts if text is not None]
            if around and around[0]:
                (head, last), (_, middle) = around[0], around[-1] or around[0]
                asked = [
                    _rendered(template, _talk(1, parts)[:1], tools, waits) or "" for waits in (False, True)
                ]
                return _Probe(template, head, last, middle, _begin(*asked))
    return None


def _talk(count: int, parts: bool) -> list[dict[str, Any]]:
    """A conversation of so many questions and answers, as texts or as lists of one part."""
    texts = [text for pair in zip(_ASKED, _ANSWERED, strict=True) for text in pair][: 2 * count]
    return [
        {
            "role": ("user", "assistant")[i % 2],
            "content": [{"type": "text", "text": text}] if parts else text,
        }
        for i, text in enumerate(texts)
    ]


def _rendered(template: Renders, messages: Messages, tools: Sequence[Any], waits: bool = False) -> str | None:
    try:
        return template.marked(messages, tools, waits, ("", ""))
    except DataError:
        return None


def _around(whole: str) -> tuple[str, str] | None:
    """What stands before the first question of a conversation, and between its answer and the next one."""
    before, asked, rest = whole.partition(_ASKED[0])
    _, answered, behind = rest.partition(_ANSWERED[0])
    return (before, behind.partition(_ASKED[1])[0]) if asked and answered else None


def _begin(plain: str, asking: str) -> str:
    """What begins an answer, of a conversation as it is and as it is asked."""
    header = asking[_same(plain, asking) :]
    if header:
        return header
    # Some templates write it always, behind the token that ends a question; it begins questions, too.
    head, _, rest = asking.partition(_ASKED[0])
    tokens = [match[0] for match in SHAPE.finditer(rest)]
    return "".join(token for token in tokens[1:] if token in head)


def _same(one: str, other: str) -> int:
    """How many characters two texts begin alike with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
