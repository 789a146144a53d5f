"""The letters of JSON texts of one form: which may come next, and how few end a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_SPACE = " \t\n\r"
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = frozenset('"\\/bfnrt')
_DEEP = 300  # symbols that wait for their turn: no further lists and objects in each other
_ENDLESS = 1 << 20
_MOST_KNOWN = 100_000  # stacks, steps, and stacks of states that are kept

#: what every letter from this one on is as good as: rules are written in the letters before it
OTHER = "\x7f"

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
    """Letters as they are, all of them ASCII.

    Attributes:
        text: all letters.
        at: how many of them have come.
    """

    text: str
    at: int = 0


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


class Stack:
    """One way in which a text may go on: a symbol, and what waits behind it. Equal ones are one object.

    Attributes:
        first: the symbol; None where the text ends here.
        rest: what waits; None where the text ends here.
        least: how few letters end it.
        depth: symbols that wait.
    """

    __slots__ = ("depth", "first", "least", "rest")

    def __init__(self, first: Symbol | None, rest: Stack | None, least: int) -> None:
        self.first, self.rest = first, rest
        self.least: int = least + (rest.least if rest is not None else 0)
        self.depth: int = rest.depth + 1 if rest is not None else 0


_END = Stack(None, None, 0)


class State:
    """All ways in which a text may go on; false where there is none. Equal ones are one object.

    Attributes:
        stacks: they.
        may_end: whether the text may end here.
        least: how few letters end it soonest.
    """

    __slots__ = ("least", "may_end", "stacks")

    def __init__(self, stacks: frozenset[Stack]) -> None:
        self.stacks, self.may_end = stacks, _END in stacks
        self.least = min((stack.least for stack in stacks), default=_ENDLESS)

    def __bool__(self) -> bool:
        return bool(self.stacks)


class Grammar:
    """Texts of one form: JSON of any kind, and what is defined beside it.

    What was found out of a state is kept: another text that comes to it finds it.

    Attributes:
        any: a value of any kind.
        object: an object of any kind.
        array: a list of any kind.
    """

    def __init__(self) -> None:
        self._rules: list[Sequence[Way]] = []
        self._least: list[int] = []
        self._stacks: dict[tuple[Symbol, Stack], Stack] = {}
        self._heads: dict[Stack, frozenset[Stack]] = {}
        self._states: dict[frozenset[Stack], State] = {}
        self._after: dict[tuple[State, str], State] = {}
        self._known = 0
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
        return self._state(self._heads_of(self._pushed((Space(), *way), _END)))

    def step(self, state: State, letter: str) -> State:
        """The state after one more letter; false where it may not come."""
        key = state, min(letter, OTHER)
        found = self._after.get(key)
        if found is None:
            found = self._state(frozenset(self._stepped(state, letter)))
            self._after[key] = found
            self._count(1)
        return found

    def halves(self, state: State) -> tuple[State, State]:
        """The ways that are between quotes, where any plain letter changes nothing, and the others."""
        between = frozenset(stack for stack in state.stacks if stack.first == Quoted())
        return self._state(between), self._state(state.stacks - between)

    @property
    def letters(self) -> str:
        """All that may have to be written to end a text."""
        symbols = (symbol for ways in self._rules for way in ways for symbol in way)
        return '"0' + "".join(symbol.text for symbol in symbols if isinstance(symbol, Text))

    def _stepped(self, state: State, letter: str) -> Iterator[Stack]:
        for stack in state.stacks:
            if stack.first is not None and stack.rest is not None:
                after = _after(stack.first, letter)
                if after is not None:
                    yield from self._heads_of(self._pushed(after, stack.rest))

    def _pushed(self, way: Way, rest: Stack) -> Stack:
        """Some symbols in front of what waits."""
        for symbol in reversed(way):
            found = self._stacks.get((symbol, rest))
            if found is None:
                found = self._stacks[symbol, rest] = Stack(symbol, rest, self._letters(symbol))
                self._count(1)
            rest = found
        return rest

    def _state(self, stacks: frozenset[Stack]) -> State:
        found = self._states.get(stacks)
        if found is None:
            found = self._states[stacks] = State(stacks)
            self._count(len(stacks))
        return found

    def _count(self, more: int) -> None:
        """Forget all, where it has become too much; states that are held elsewhere go on as they are."""
        self._known += more
        if self._known > _MOST_KNOWN:
            self._known = 0
            for kept in (self._stacks, self._heads, self._states, self._after):
                kept.clear()

    def _heads_of(self, stack: Stack) -> frozenset[Stack]:
        """Those that begin with what takes a letter, instead of one that begins with anything."""
        found = self._heads.get(stack)
        if found is None:
            found = self._heads[stack] = frozenset(self._found_heads(stack))
        return found

    def _found_heads(self, stack: Stack) -> Iterator[Stack]:
        left = [stack]
        while left:
            stack = left.pop()
            first, rest = stack.first, stack.rest
            if first is None or rest is None:
                yield stack
                continue
            if isinstance(first, Rule):
                deep = first == self.any and rest.depth > _DEEP
                ways = self._scalars if deep else self._rules[first.number]
                left += (self._pushed(way, rest) for way in ways)
                continue
            is_whole = isinstance(first, Text) and first.at == len(first.text)
            if not is_whole:
                yield stack
            if is_whole or isinstance(first, Space) or (isinstance(first, Number) and first.place in _WHOLE):
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
            return len(symbol.text) - symbol.at
        if isinstance(symbol, Quoted):
            return 1 + len(symbol.rest)
        return int(isinstance(symbol, Number) and symbol.place not in _WHOLE)


def _after(symbol: Symbol, letter: str) -> Way | None:
    """What is left of a symbol once a letter of it has come; None where it may not."""
    if isinstance(symbol, Text):
        return (Text(symbol.text, symbol.at + 1),) if symbol.text[symbol.at] == letter else None
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
