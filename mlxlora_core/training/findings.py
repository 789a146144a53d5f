"""What there is to tell of rows that can be used: texts that are no content, or look like something else.

Nothing here knows tokens, so that a dataset can be looked at before there is a model.
What a tokenizer does to a row is added by those who have one.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mlxlora_core.errors import listing, one_line
from mlxlora_core.model.special_texts import special_texts

_NAMES_TOLD = 6
_SAID = ("reasoning_content", "reasoning", "thinking", "content")  # the texts of a message
# White space, and what is neither seen nor takes any room.
_NOTHING = {"Cc", "Cf", "Zl", "Zp", "Zs"}


class Finding(Enum):
    """Something to tell of a row; the value is what is said of so many rows."""

    SPECIAL = "with {names} as text: letters, and not the tokens that models write so"
    TAKEN = "with {names}, which the tokenizer takes for the tokens of these names"
    BLANK = "of nothing but white space"
    NO_ANSWER = "with an answer without content, which teaches to end at once"
    NO_QUESTION = "with a question without content"
    EDGES = "with white space at the ends of messages, which is kept"
    CUT_EDGES = "with white space at the ends of messages, which the form of the model cuts off"
    APART = (
        "with a prompt and a completion that the tokenizer would join in one token; they are kept apart, as "
        "when the prompt is asked (white space is best put at the front of the completion)"
    )
    CHANGED = "with characters that the tokenizer lacks or changes: their tokens are those of another text"
    ASKED_OTHERWISE = "with another beginning than when they are asked: the form depends on the answer"


#: those that are as they should be, and are told for the record
_SOUND = {Finding.EDGES, Finding.CUT_EDGES}


@dataclass
class Findings:
    """How many rows there is something to tell of, where the first is, and which special texts they hold."""

    rows: Counter[Finding] = field(default_factory=Counter)
    first: dict[Finding, str] = field(default_factory=dict)
    names: dict[Finding, Counter[str]] = field(default_factory=dict)

    def add(self, finding: Finding, place: str, names: Iterable[str] = ()) -> None:
        """Count a row.

        Args:
            finding: what there is to tell of it.
            place: where it stands.
            names: special texts that it holds.
        """
        self.rows[finding] += 1
        self.first.setdefault(finding, place)
        self.names.setdefault(finding, Counter()).update(names)

    def sentences(self, kind: str) -> Iterator[str]:
        """A line for each finding.

        Args:
            kind: what the rows are called, such as ``train``.
        """
        for finding in Finding:
            if count := self.rows[finding]:
                names = [one_line(name) for name, _ in self.names[finding].most_common()]
                said = finding.value.format(names=listing(names, _NAMES_TOLD))
                warning = "" if finding in _SOUND else "warning: "
                yield f"{warning}{counted(count, kind)} {said} (the first: {self.first[finding]})"


def counted(count: int, kind: str) -> str:
    """So many rows of a kind, in words."""
    return f"{count} {kind} row{'s' if count != 1 else ''}"


def look(content: Mapping[str, Any]) -> list[Finding]:
    """What there is to tell of a row whatever the tokenizer is, but for the special texts in it."""
    if "text" in content:
        return [Finding.BLANK] if is_blank(content["text"]) else []
    if "prompt" in content:
        blank = is_blank(content["completion"])
        return [Finding.BLANK if is_blank(content["prompt"]) else Finding.NO_ANSWER] if blank else []
    said = [
        (message["role"], message.get("content", ""))
        for message in content["messages"]
        if not message.get("tool_calls")
    ]
    found = []
    if any(is_blank(text) for role, text in said if role == "assistant"):
        found.append(Finding.NO_ANSWER)
    if any(is_blank(text) for role, text in said if role != "assistant"):
        found.append(Finding.NO_QUESTION)
    if any(text != text.strip() and not is_blank(text) for _, text in said):
        found.append(Finding.EDGES)
    return found


def findings_in(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Findings:
    """What there is to tell of (place, content) rows before there is a tokenizer."""
    found = Findings()
    for place, content in rows:
        for finding in look(content):
            found.add(finding, place)
        if special := {name for text in texts(content) for name in special_texts(text)}:
            found.add(Finding.SPECIAL, place, sorted(special))
    return found


def texts(content: Mapping[str, Any]) -> list[str]:
    """Every text in a row."""
    if "messages" in content:
        return [message[key] for message in content["messages"] for key in _SAID if key in message]
    return [content[key] for key in ("text", "prompt", "completion") if key in content]


def is_blank(text: str) -> bool:
    """Whether nothing in a text is seen: it is empty, or white space and the like."""
    return not text.strip() or all(unicodedata.category(letter) in _NOTHING for letter in text)
