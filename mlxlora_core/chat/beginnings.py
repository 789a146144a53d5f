"""Beginnings of conversations as text, kept for when the same conversation comes with one more turn.

A template may write a beginning in another way than the whole, so that each is rendered by
itself. What a beginning becomes depends on its messages alone: where a conversation goes on, the
beginnings of the time before need not be rendered again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_MOST_CONVERSATIONS = 16
_FEWEST_MESSAGES = 6  # of a shorter conversation nothing is worth keeping
_MOST_REST = 4096  # characters

#: how many characters of a beginning are those of the whole, and what stands behind them; None if refused
_Found = tuple[int, str] | None


class Beginnings:
    """The beginnings of one conversation.

    Args:
        said: the tools and the messages, each as JSON.
        whole: the text of all.
    """

    def __init__(self, said: Sequence[str], whole: str) -> None:
        self.said, self.whole = said, whole
        self._found: dict[tuple[int, bool], _Found] = {}

    def text(self, count: int, waits: bool, render: Callable[[], str | None]) -> str | None:
        """The first messages as text, or None where the template refuses them.

        Args:
            count: how many messages.
            waits: whether the beginning of an answer stands behind them.
            render: renders them.
        """
        key = count, waits
        if key in self._found:
            found = self._found[key]
            return found if found is None else self.whole[: found[0]] + found[1]
        text = render()
        alike = 0 if text is None else _alike(self.whole, text)
        if text is None or len(text) - alike <= _MOST_REST:
            self._found[key] = None if text is None else (alike, text[alike:])
        return text

    def take(self, other: Beginnings) -> None:
        """Take over what is known of a conversation that begins alike."""
        messages = self.alike(other) - 1  # the tools stand in front
        characters = _alike(self.whole, other.whole)
        for (count, waits), found in other._found.items():
            if count <= messages and (found is None or found[0] <= characters):
                self._found[count, waits] = found

    def alike(self, other: Beginnings) -> int:
        """How many messages, the tools among them, it has in common with another one."""
        return sum(1 for _ in _same(self.said, other.said))


class KnownBeginnings:
    """Those of the last few conversations."""

    def __init__(self) -> None:
        self._kept: tuple[Beginnings, ...] = ()

    def of(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], whole: str) -> Beginnings:
        """The beginnings of a conversation, with what is known of them; kept for the next one.

        Args:
            messages: the conversation.
            tools: that the assistant has.
            whole: its text.
        """
        said = [json.dumps(each, default=str) for each in (list(tools), *messages)]
        found = Beginnings(said, whole)
        if len(messages) < _FEWEST_MESSAGES:
            return found
        before = max(self._kept, key=found.alike, default=found)
        if found.alike(before) > 1:
            found.take(before)
        # One that goes on takes the place of what it was before.
        others = [each for each in self._kept if found.alike(each) < len(each.said)]
        self._kept = (found, *others)[:_MOST_CONVERSATIONS]
        return found


def _same(some: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    """What two sequences begin alike with."""
    for one, other in zip(some, others, strict=False):
        if one != other:
            return
        yield one


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin alike with."""
    if one.startswith(other):
        return len(other)
    low, high = 0, min(len(one), len(other))
    while low < high:  # all up to ``low`` are alike
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
