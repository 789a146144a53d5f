"""The letters of JSON on one line: which may come next, and how few end a text.

Source: RFC 8259, with white space in two places only: one blank may stand in
front of the text, and one behind a comma or a colon. A model cannot fill its
answer with blanks then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Symbol = tuple[str, Any]  # which, and what is left of it
State = tuple[Symbol, ...]  # all that is still to come, the next in front

_GAP: Symbol = ("gap", None)
_ANY = ("string", "number", "boolean", "null", "array", "object")
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGITS = "0123456789"
_ESCAPE = 6  # letters of an escape by its number

#: what has come of a number -> letters that may come -> what has come then
_NUMBER: dict[str, dict[str, str]] = {
    "": {"-": "-", "0": "0", "123456789": "1"},
    "-": {"0": "0", "123456789": "1"},
    "0": {".": ".", "eE": "e"},
    "1": {_DIGITS: "1", ".": ".", "eE": "e"},
    ".": {_DIGITS: ".1"},
    ".1": {_DIGITS: ".1", "eE": "e"},
    "e": {_DIGITS: "e1", "+-": "e+"},
    "e+": {_DIGITS: "e1"},
    "e1": {_DIGITS: "e1"},
}
_WHOLE = frozenset(["0", "1", ".1", "e1"])  # a number may end there
_SHORTEST = {"string": 2, "number": 1, "integer": 1, "boolean": 4, "null": 4, "array": 2, "object": 2}


class Grammar:
    """Texts of one form.

    Args:
        form: ``object``, ``array`` or ``any``.
        fields: (name, kinds of values) of all that each object has; none is anything.
        depth: arrays and objects in each other at most.

    Attributes:
        begin: the state before a text.
    """

    def __init__(self, form: str, fields: Sequence[tuple[str, tuple[str, ...]]], depth: int) -> None:
        self._takes: dict[str, Callable[[Any, str, State], State | None]] = {
            "text": _text,
            "string": _string,
            "number": _number,
            "value": self._value,
            "items": self._items,
            "members": self._members,
        }
        inner = depth - 1 - (form == "array")
        self._record: State = ()
        for place, (name, kinds) in enumerate(fields):
            front = ("text", ",") if place else ("text", "{")
            text = ("text", f"{json.dumps(name)}:")
            self._record += (front, *[_GAP] * bool(place), text, _GAP, ("value", (kinds, inner)))
        self._record += (("text", "}"),) if fields else ()
        kinds = _ANY if form == "any" else (form,)
        if fields and form == "object":
            self.begin: State = (_GAP, *self._record)
        else:
            self.begin = (_GAP, ("value", (kinds, depth)))
        self._item = ("record",) if fields and form == "array" else _ANY

    def step(self, state: State, letter: str) -> State | None:
        """The state after one more letter; None where it may not come."""
        while state:
            (symbol, what), rest = state[0], state[1:]
            if symbol == "gap":
                if letter == " ":
                    return rest
            elif symbol == "number" and what[0] in _WHOLE and _next_place(what, letter) is None:
                pass  # the number ends in front of this letter
            else:
                return self._takes[symbol](what, letter, rest)
            state = rest
        return None

    def may_end(self, state: State) -> bool:
        """Whether a text may end there."""
        return self.least(state) == 0

    def least(self, state: State) -> int:
        """How many letters end a text soonest."""
        return sum(self._letters(symbol, what) for symbol, what in state)

    def _letters(self, symbol: str, what: Any) -> int:
        if symbol == "text":
            return len(what)
        if symbol == "string":
            return 1 + (_ESCAPE - len(what) if what[1:] else len(what))
        if symbol == "number":
            return int(what[0] not in _WHOLE)
        if symbol == "value":
            kinds, _ = what
            return min(self.least(self._record) if kind == "record" else _SHORTEST[kind] for kind in kinds)
        return int(symbol != "gap")  # the bracket that closes items or members

    # --- what takes a letter: what is left of a symbol, the letter, all behind it -> the state then ---

    def _value(self, what: Any, letter: str, rest: State) -> State | None:
        kinds, depth = what
        if letter == '"' and "string" in kinds:
            return (("string", ""), *rest)
        if letter == "{" and "record" in kinds:
            return (*self._record[1:], *rest)
        if letter == "{" and "object" in kinds and depth > 0:
            return (("members", (True, depth - 1)), *rest)
        if letter == "[" and "array" in kinds and depth > 0:
            return (("items", (True, depth - 1)), *rest)
        for word, kind in (("true", "boolean"), ("false", "boolean"), ("null", "null")):
            if letter == word[0] and kind in kinds:
                return (("text", word[1:]), *rest)
        if "number" in kinds or "integer" in kinds:
            return _number(("", "number" not in kinds), letter, rest)
        return None

    def _items(self, what: Any, letter: str, rest: State) -> State | None:
        first, depth = what
        value, more = ("value", (self._item, depth)), ("items", (False, depth))
        if letter == "]":
            return rest
        if first:
            return self._value(value[1], letter, (more, *rest))
        return (_GAP, value, more, *rest) if letter == "," else None

    def _members(self, what: Any, letter: str, rest: State) -> State | None:
        first, depth = what
        behind = (("text", ":"), _GAP, ("value", (_ANY, depth)), ("members", (False, depth)), *rest)
        if letter == "}":
            return rest
        if first:
            return (("string", ""), *behind) if letter == '"' else None
        return (_GAP, ("text", '"'), ("string", ""), *behind) if letter == "," else None


def _text(what: str, letter: str, rest: State) -> State | None:
    if what[0] != letter:
        return None
    return (("text", what[1:]), *rest) if len(what) > 1 else rest


def _string(escape: str, letter: str, rest: State) -> State | None:
    """Between quotes; an escape of half a surrogate pair, which is no text, never comes.

    Args:
        escape: what has come of one, or nothing.
        letter: the next.
        rest: what is behind the string.
    """
    if not escape:
        if letter == '"':
            return rest
        return None if letter < " " else (("string", "\\" if letter == "\\" else ""), *rest)
    if escape == "\\":
        if letter == "u":
            return (("string", "\\u"), *rest)
        return (("string", ""), *rest) if letter in '"\\/bfnrt' else None
    if letter not in _HEX or (escape == "\\ud" and letter not in "01234567"):
        return None
    escape += "d" if escape == "\\u" and letter in "dD" else "0"  # of the digits, no more counts
    return (("string", "" if len(escape) == _ESCAPE else escape), *rest)


def _number(what: tuple[str, bool], letter: str, rest: State) -> State | None:
    place = _next_place(what, letter)
    return None if place is None else (("number", (place, what[1])), *rest)


def _next_place(what: tuple[str, bool], letter: str) -> str | None:
    """What has come of a number with one more letter; an integer has neither point nor exponent."""
    place, whole = what
    for letters, then in _NUMBER[place].items():
        if letter in letters:
            return None if whole and then in (".", "e") else then
    return None
