"""The texts that are a JSON object, letter by letter: what may follow, and what would end it soonest."""

from __future__ import annotations

from typing import NamedTuple

_SPACE = " \t\n\r"
_DIGITS = frozenset("0123456789")
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = frozenset('"\\/bfnrt')
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_DEEPEST = 64

#: where a text is: before a value, a key and so on
START, VALUE, FIRST_KEY, KEY, COLON = "start", "value", "first key", "key", ":"
FIRST_ITEM, AFTER, DONE = "first item", ",", "done"
#: in a text between quotes: of a key or of a value; behind a backslash, or before so many hex digits
IN_KEY, IN_TEXT = "in key", "in text"
#: in a number, by what has come of it
MINUS, ZERO, WHOLE, POINT, FRACTION, EXPONENT, SIGN, POWER = "-", "0", "1", ".", ".1", "e", "e+", "e1"
LITERAL = "literal"

#: number so far -> what may come -> number then
_NUMBER = {
    MINUS: {"0": ZERO, "d": WHOLE},
    ZERO: {".": POINT, "e": EXPONENT},
    WHOLE: {"0": WHOLE, "d": WHOLE, ".": POINT, "e": EXPONENT},
    POINT: {"0": FRACTION, "d": FRACTION},
    FRACTION: {"0": FRACTION, "d": FRACTION, "e": EXPONENT},
    EXPONENT: {"0": POWER, "d": POWER, "+": SIGN},
    SIGN: {"0": POWER, "d": POWER},
    POWER: {"0": POWER, "d": POWER},
}
_UNFINISHED = (MINUS, POINT, EXPONENT, SIGN)


class State(NamedTuple):
    """How far a text has come.

    Attributes:
        place: one of the words above.
        inside: what it is in, from the outermost on: ``{`` and ``[``.
        rest: of a literal, what must follow; between quotes ``\\``, or a letter for each hex digit.
    """

    place: str
    inside: str = ""
    rest: str = ""


BEGIN = State(START)


def step(state: State, letter: str) -> State | None:
    """The state after one more letter; None where it may not come."""
    place, inside, rest = state
    if place in (IN_KEY, IN_TEXT):
        return _between_quotes(state, letter)
    if place == LITERAL:
        return State(LITERAL, inside, rest[1:]) if letter == rest[:1] else _after(state, letter, not rest)
    if place in _NUMBER:
        kind = (
            "0" if letter == "0" else "d" if letter in _DIGITS else {"E": "e", "-": "+"}.get(letter, letter)
        )
        found = _NUMBER[place].get(kind)
        return State(found, inside) if found else _after(state, letter, place not in _UNFINISHED)
    if letter in _SPACE:
        return None if place == DONE else state
    if place in (VALUE, FIRST_ITEM, START):
        return _value(state, letter)
    if place in (KEY, FIRST_KEY):
        if letter == '"':
            return State(IN_KEY, inside)
        return _closed(inside) if letter == "}" and place == FIRST_KEY else None
    if place == COLON:
        return State(VALUE, inside) if letter == ":" else None
    return _after(state, letter, place == AFTER)


def ending(state: State) -> str:
    """The fewest letters that make the text a whole JSON object."""
    place, inside, rest = state
    own = {
        START: "{}",
        VALUE: "0",
        KEY: '"":0',
        COLON: ":0",
        IN_KEY: '":0',
        IN_TEXT: '"',
        LITERAL: rest,
    }.get(place, "0" if place in _UNFINISHED else "")
    if place in (IN_KEY, IN_TEXT):
        own = ("\\" if rest == "\\" else "0" * len(rest)) + own
    return own + "".join("}" if each == "{" else "]" for each in reversed(inside))


def _between_quotes(state: State, letter: str) -> State | None:
    place, inside, rest = state
    if rest == "\\":
        if letter == "u":
            return State(place, inside, "uuuu")
        return State(place, inside) if letter in _ESCAPES else None
    if rest:
        return State(place, inside, rest[1:]) if letter in _HEX else None
    if letter == '"':
        return State(COLON if place == IN_KEY else AFTER, inside)
    if letter == "\\":
        return State(place, inside, "\\")
    return None if letter < " " else state


def _value(state: State, letter: str) -> State | None:
    """Behind the first letter of a value, or of the object that all is in."""
    place, inside, _ = state
    if letter in "{[" and len(inside) < _DEEPEST and (place != START or letter == "{"):
        return State(FIRST_KEY if letter == "{" else FIRST_ITEM, inside + letter)
    if letter == "]" and place == FIRST_ITEM:
        return _closed(inside)
    if place == START:
        return None
    if letter == '"':
        return State(IN_TEXT, inside)
    if letter in _LITERALS:
        return State(LITERAL, inside, _LITERALS[letter])
    number = MINUS if letter == "-" else ZERO if letter == "0" else WHOLE if letter in _DIGITS else None
    return State(number, inside) if number else None


def _after(state: State, letter: str, whole: bool) -> State | None:
    """Behind a value, if it is ``whole``."""
    inside = state.inside
    if not whole or not inside:
        return None
    if letter in _SPACE:
        return State(AFTER, inside)
    if letter == ",":
        return State(KEY if inside[-1] == "{" else VALUE, inside)
    return _closed(inside) if letter == ("}" if inside[-1] == "{" else "]") else None


def _closed(inside: str) -> State:
    left = inside[:-1]
    return State(AFTER, left) if left else State(DONE)
