"""The letters of JSON texts of one form: which may come next, and how few end a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_SPACE = " \t\n\r"
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = frozenset('"\\/bfnrt')
_DEEP = 300  # symbols that wait for their turn: no further lists and objects in each other
_ENDLESS = 1 << 20
_MOST_KNOWN = 20_000  # ways of which the heads are kept

_DIGITS = "0123456789"
#: number so far -> letters that may come -> number then
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
_WHOLE = ("0", "1", ".1", "e1")  # numbers that may end


@dataclass(frozen=True, slots=True)
class Text:
    """Letters as they are."""

    text: str


@dataclass(frozen=True, slots=True)
class Quoted:
    """What is between quotes, the closing one included.

    Attributes:
        rest: a backslash behind one; a letter for each hex digit that must follow.
    """

    rest: str = ""


@dataclass(frozen=True, slots=True)
class Number:
    """A number, by what has come of it.

    Attributes:
        place: a key of :data:`_NUMBER`.
        is_integer: whether it has neither point nor exponent.
    """

    place: str = ""
    is_integer: bool = False


@dataclass(frozen=True, slots=True)
class Space:
    """White space, or none."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One of several ways to go on, by its number in a grammar."""

    number: int


Symbol = Text | Quoted | Number | Space | Rule
#: symbols in their order
Way = tuple[Symbol, ...]
#: all ways in which a text may go on; the empty one is its end
State = frozenset[Way]


class Grammar:
    """Texts of one form: JSON of any kind, and what is defined beside it.

    Attributes:
        any: a value of any kind.
        object: an object of any kind.
        array: a list of any kind.
    """

    def __init__(self) -> None:
        self._rules: list[Sequence[Way]] = []
        self._least: list[int] = []
        self._known: dict[Way, Sequence[Way]] = {}
        self.any = self.rule()
        self.object = self.several("{}", (Text('"'), Quoted(), Space(), Text(":"), Space(), self.any))
        self.array = self.several("[]", (self.any,))
        self._scalars: list[Way] = [(Number(),), (Text('"'), Quoted())]
        self._scalars += [(Text(word),) for word in ("true", "false", "null")]
        self.define(self.any, [*self._scalars, self.object, self.array])

    def rule(self, ways: Sequence[Way] = ()) -> Rule:
        """A new rule; without ways it is to be defined yet."""
        self._rules.append(ways)
        return Rule(len(self._rules) - 1)

    def define(self, rule: Rule, ways: Sequence[Way]) -> None:
        """Say what a rule is."""
        self._rules[rule.number] = ways

    def several(self, brackets: str, item: Way) -> Way:
        """Any number of items between brackets, with commas between them."""
        more = self.rule()
        end = (Text(brackets[1]),)
        self.define(more, [end, (Text(","), Space(), *item, Space(), more)])
        return Text(brackets[0]), Space(), self.rule([end, (*item, Space(), more)])

    def begin(self, way: Way) -> State:
        """The state before a text, or white space in front of it; all rules are defined."""
        self._measure()
        return frozenset(self._heads((Space(), *way)))

    def step(self, state: State, letter: str) -> State:
        """The state after one more letter; empty where it may not come."""
        found: set[Way] = set()
        for way in state:
            after = _after(way[0], letter) if way else None
            if after is not None:
                found.update(self._heads((*after, *way[1:])))
        return frozenset(found)

    def least(self, state: State) -> int:
        """How many letters end a text soonest."""
        return min(sum(map(self._letters, way)) for way in state)

    @property
    def letters(self) -> str:
        """All that may have to be written to end a text."""
        symbols = (symbol for ways in self._rules for way in ways for symbol in way)
        return '"0' + "".join(symbol.text for symbol in symbols if isinstance(symbol, Text))

    def _heads(self, way: Way) -> Sequence[Way]:
        """Ways that begin with what takes a letter, instead of one that begins with anything."""
        known = self._known.get(way)
        if known is None:
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
            known = self._known[way] = list(self._found_heads(way))
        return known

    def _found_heads(self, way: Way) -> Iterator[Way]:
        left = [way]
        while left:
            way = left.pop()
            if not way:
                yield way
                continue
            first, rest = way[0], way[1:]
            if isinstance(first, Rule):
                deep = first == self.any and len(rest) > _DEEP
                left += ((*each, *rest) for each in (self._scalars if deep else self._rules[first.number]))
                continue
            is_empty = isinstance(first, Text) and not first.text
            if not is_empty:
                yield way
            if is_empty or isinstance(first, Space) or (isinstance(first, Number) and first.place in _WHOLE):
                left.append(rest)

    def _measure(self) -> None:
        """Find the fewest letters of each rule."""
        self._least = [_ENDLESS] * len(self._rules)
        changed = True
        while changed:
            changed = False
            for number, ways in enumerate(self._rules):
                found = min((sum(map(self._letters, way)) for way in ways), default=_ENDLESS)
                changed = changed or found < self._least[number]
                self._least[number] = min(found, self._least[number])

    def _letters(self, symbol: Symbol) -> int:
        """The fewest letters of a symbol."""
        if isinstance(symbol, Rule):
            return self._least[symbol.number]
        if isinstance(symbol, Text):
            return len(symbol.text)
        if isinstance(symbol, Quoted):
            return 1 + len(symbol.rest)
        return int(isinstance(symbol, Number) and symbol.place not in _WHOLE)


def _after(symbol: Symbol, letter: str) -> Way | None:
    """What is left of a symbol once a letter of it has come; None where it may not."""
    if isinstance(symbol, Text):
        return (Text(symbol.text[1:]),) if symbol.text[:1] == letter else None
    if isinstance(symbol, Space):
        return (symbol,) if letter in _SPACE else None
    if isinstance(symbol, Number):
        places = [place for letters, place in _NUMBER[symbol.place].items() if letter in letters]
        if not places or (symbol.is_integer and places[0] in ".e"):
            return None
        return (Number(places[0], symbol.is_integer),)
    assert isinstance(symbol, Quoted), "no rule stands in front"
    return _between_quotes(symbol.rest, letter)


def _between_quotes(rest: str, letter: str) -> Way | None:
    if rest == "\\":
        if letter == "u":
            return (Quoted("uuuu"),)
        return (Quoted(),) if letter in _ESCAPES else None
    if rest:
        return (Quoted(rest[1:]),) if letter in _HEX else None
    if letter == '"':
        return ()
    if letter == "\\":
        return (Quoted("\\"),)
    return None if letter < " " else (Quoted(),)
