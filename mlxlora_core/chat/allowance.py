"""What a template may use up: every step and every value costs units, counted the same on every machine.

A unit is some tenths of a microsecond of work, or a few characters. Nothing here looks at a
clock: a template that renders a conversation once renders it always.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

BASE_UNITS = 5_000_000
UNITS_PER_VALUE = 10_000  # of the conversation and its tools: templates look through them in loops in loops
UNITS_PER_CHARACTER = 16
MOST_UNITS = 300_000_000

MOST_LEVELS = 100  # of lists and objects in each other
MOST_BITS = 4096  # of an integer that is computed with
MOST_WIDTH = 100_000  # that a text is padded to

_CHARACTERS_PER_UNIT = 4
_VALUE_UNITS = 4
_VIEWS = (KeysView, ValuesView, ItemsView)


class Overrun(SecurityError):
    """A template that wants more than it is allowed."""


class Allowance:
    """Units that are left.

    Args:
        units: how many there are at the start.
    """

    def __init__(self, units: int) -> None:
        self._left = units

    def spend(self, units: int) -> None:
        """Take units away.

        Raises:
            Overrun: there are not so many.
        """
        self._left -= units
        if self._left < 0:
            raise Overrun("it loops for too long or makes too much text")

    def text(self, characters: int) -> None:
        """Take away what a text of so many characters costs, before it is made.

        Raises:
            Overrun: that is more than is left.
        """
        self.spend(1 + characters // _CHARACTERS_PER_UNIT)

    def weigh(self, value: Any) -> None:
        """Take away what it costs to go through a value with all that it holds.

        Raises:
            Overrun: that is more than is left, or it is nested too deeply.
        """
        if isinstance(value, str):
            return self.text(len(value))
        level: list[Any] = [value]
        for _ in range(MOST_LEVELS):
            following: list[Any] = []
            for part in level:
                inside = _inside(part)
                self.spend(_VALUE_UNITS + _size(part))
                following += inside
            if not following:
                return None
            level = following
        raise Overrun(f"it nests values more than {MOST_LEVELS} levels deep")


def _size(value: Any) -> int:
    """Units of a value without those in it."""
    if isinstance(value, str):
        return len(value) // _CHARACTERS_PER_UNIT
    if isinstance(value, int):
        return int(value).bit_length() // 64
    return len(value) if isinstance(value, range) else 0


def _inside(value: Any) -> Sequence[Any]:
    """The values that one holds."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, Namespace):
        return [value._Namespace__attrs]  # what it prints
    return list(value) if isinstance(value, _VIEWS) else ()


def units_of(*values: Any) -> int:
    """What a template may use for a conversation of these values."""
    count = characters = 0
    for value in _everything(list(values)):
        count += 1
        characters += len(value) if isinstance(value, str) else 0
    # Some templates put the text together message by message, and copy what they have each time.
    copied = characters * count // 8
    return min(BASE_UNITS + UNITS_PER_VALUE * count + UNITS_PER_CHARACTER * characters + copied, MOST_UNITS)


def _everything(values: list[Any]) -> Iterator[Any]:
    """Values and all that they hold; these are of JSON, and so no value holds itself."""
    while values:
        value = values.pop()
        yield value
        if isinstance(value, Mapping):
            values += [*value, *value.values()]
        elif isinstance(value, list | tuple | Set):
            values += value
