"""What a JSON file of our own holds, described: its keys, and the type and range of each value.

A form stands beside whoever writes such a file. Whoever reads it back takes
what was read through the form: :func:`sound` gives what agrees with it and
tells what does not. A form never believes a type: ``true`` is no number and
2.0 no count, and a number that no computation stands is none.
"""

from __future__ import annotations

import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from mlxlora_core.errors import short

MOST = 2**63 - 1  # of a whole number
ITEMS = 10_000_000  # of a list

_FAULTS_KEPT = 20
_VALUE_LETTERS = 40

#: where a value stands: (where its container stands, key or index), from the inside out
At = tuple[Any, ...]


class _Nothing(Enum):
    """In the place of a value."""

    UNSOUND = "what was read is not what the form says"
    LEFT_OUT = "there is none, which is no harm"


UNSOUND: Final = _Nothing.UNSOUND
LEFT_OUT: Final = _Nothing.LEFT_OUT


class Faults:
    """What does not agree with a form; the first ones in words."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.count = 0

    def add(self, at: At, what: str) -> _Nothing:
        """Note one; gives :data:`UNSOUND`."""
        self.count += 1
        if len(self.told) < _FAULTS_KEPT:
            place = _place(at)
            self.told.append(f"{place}: {what}" if place else what)
        return UNSOUND


class Form(ABC):
    """What a value must be."""

    @abstractmethod
    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The sound part of ``value``, :data:`UNSOUND` or :data:`LEFT_OUT`; notes what is not sound."""

    def lacking(self, at: At, key: str, faults: Faults) -> Any:
        """What stands in a table that has no such key."""
        return faults.add(at, f"lacks {short(key, _VALUE_LETTERS)}")


def sound(form: Form, value: Any) -> tuple[Any, list[str]]:
    """The part of ``value`` that agrees with ``form``, and what does not, in words.

    Where nothing agrees, the first is :data:`UNSOUND`.
    """
    faults = Faults()
    taken = form.take(value, (), faults)
    rest = faults.count - len(faults.told)
    return taken, [*faults.told, *([f"and {rest} more"] if rest else [])]


# --- single values ------------------------------------------------------------


@dataclass(frozen=True)
class Text(Form):
    """A text; one of ``among``, where that names any."""

    among: tuple[str, ...] = ()

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The text."""
        if not isinstance(value, str) or (self.among and value not in self.among):
            return faults.add(at, f"wanted {' or '.join(self.among) or 'a text'}, got {shown(value)}")
        return value


@dataclass(frozen=True)
class Flag(Form):
    """True or false."""

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The flag."""
        return (
            value if isinstance(value, bool) else faults.add(at, f"wanted true or false, got {shown(value)}")
        )


@dataclass(frozen=True)
class Whole(Form):
    """A whole number, written as one, from ``least`` to ``most``."""

    least: int = 0
    most: int = MOST

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The number."""
        if type(value) is int and self.least <= value <= self.most:
            return value
        return faults.add(at, f"wanted a whole number from {self.least} to {self.most}, got {shown(value)}")


@dataclass(frozen=True)
class Number(Form):
    """A finite number from ``least`` on."""

    least: float = -sys.float_info.max

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The number."""
        if type(value) in (int, float) and self.least <= value <= sys.float_info.max:
            return value
        return faults.add(at, f"wanted a finite number, got {shown(value)}")


@dataclass(frozen=True)
class Plain(Form):
    """Any value of JSON whose numbers are finite and, where whole, of 64 bits."""

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The value, whole or not at all."""
        parts: Iterable[tuple[Any, Any]]
        if isinstance(value, dict):
            parts = value.items()
        elif isinstance(value, list):
            parts = enumerate(value)
        elif isinstance(value, int) and not -MOST - 1 <= value <= MOST:
            return faults.add(at, f"wanted a number of 64 bits, got {shown(value)}")
        elif isinstance(value, float):
            return Number().take(value, at, faults)
        elif value is None or isinstance(value, str | int):
            return value
        else:  # a date of TOML
            return faults.add(at, f"wanted a plain value, got {shown(value)}")
        good = [self.take(part, (at, key), faults) is not UNSOUND for key, part in parts]
        return value if all(good) else UNSOUND


# --- values of values ---------------------------------------------------------


@dataclass(frozen=True)
class Maybe(Form):
    """null, or what ``form`` says."""

    form: Form

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The value."""
        return None if value is None else self.form.take(value, at, faults)


@dataclass(frozen=True)
class Items(Form):
    """A list of ``least`` to ``most`` values of one form; one that is not sound spoils it."""

    form: Form
    least: int = 0
    most: int = ITEMS

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The list."""
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            return faults.add(at, f"wanted a list of {self.least} to {self.most}, got {shown(value)}")
        taken = [self.form.take(part, (at, i), faults) for i, part in enumerate(value)]
        return UNSOUND if UNSOUND in taken else taken


@dataclass(frozen=True)
class Map(Form):
    """name -> value of one form; entries that are not sound are left out of it."""

    form: Form

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The sound entries."""
        if not isinstance(value, dict):
            return faults.add(at, f"wanted an object, got {shown(value)}")
        taken = ((key, self.form.take(part, (at, key), faults)) for key, part in value.items())
        return {key: part for key, part in taken if not isinstance(part, _Nothing)}


@dataclass(frozen=True)
class Strict(Form):
    """What ``form`` says, whole or not at all: nothing in it is forgiven."""

    form: Form

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The value."""
        before = faults.count
        taken = self.form.take(value, at, faults)
        return taken if faults.count == before else UNSOUND


@dataclass(frozen=True)
class Option(Form):
    """A value of a table that may be left out, and is where it is not sound."""

    form: Form

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The value, or nothing."""
        taken = self.form.take(value, at, faults)
        return LEFT_OUT if taken is UNSOUND else taken

    def lacking(self, at: At, key: str, faults: Faults) -> Any:
        """Nothing."""
        return LEFT_OUT


@dataclass(frozen=True)
class Table(Form):
    """An object of known keys; one that it lacks, or that is not sound, spoils it unless its form forgives.

    What stands under other keys, as another version may write them, is of the
    form ``others``; where that is None, it is left out.
    """

    keys: Mapping[str, Form]
    others: Form | None = Option(Plain())

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The table."""
        if not isinstance(value, dict):
            return faults.add(at, f"wanted an object, got {shown(value)}")
        taken: dict[str, Any] = {}
        for key, form in self.keys.items():
            there = key in value
            taken[key] = form.take(value[key], (at, key), faults) if there else form.lacking(at, key, faults)
        others = self.others
        if others is not None:
            rest = value.keys() - self.keys.keys()
            taken |= {key: others.take(value[key], (at, key), faults) for key in rest}
        if UNSOUND in taken.values():
            return UNSOUND
        return {key: part for key, part in taken.items() if part is not LEFT_OUT}


@dataclass(frozen=True)
class Else(Form):
    """A value in whose place ``instead()`` stands where it is not sound or not there."""

    form: Form
    instead: Callable[[], Any]

    def take(self, value: Any, at: At, faults: Faults) -> Any:
        """The value, or the other."""
        taken = self.form.take(value, at, faults)
        return self.instead() if taken is UNSOUND else taken

    def lacking(self, at: At, key: str, faults: Faults) -> Any:
        """The other."""
        super().lacking(at, key, faults)
        return self.instead()


# --- made from dataclasses ----------------------------------------------------


def form_of(kind: type[Any]) -> Table:
    """The form of ``asdict`` of a dataclass, by its annotations; whole numbers are counts, from 0 on."""
    hints = get_type_hints(kind)
    return Table({field.name: _annotated(hints[field.name]) for field in fields(kind)})


def _annotated(hint: Any) -> Form:
    single: dict[Any, Form] = {str: Text(), bool: Flag(), int: Whole(), float: Number()}
    if hint in single:
        return single[hint]
    if isinstance(hint, type) and is_dataclass(hint):
        return form_of(hint)
    arguments = [part for part in get_args(hint) if part not in (type(None), Ellipsis)]
    origin = get_origin(hint)
    if origin in (Union, types.UnionType) and len(arguments) == 1:
        return Maybe(_annotated(arguments[0]))
    if origin in (tuple, list):
        return Items(_annotated(arguments[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return Map(_annotated(arguments[1]))
    raise TypeError(f"no form for {hint}")


# --- words --------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as a fault tells it."""
    if isinstance(value, dict | list):
        many = "an object" if isinstance(value, dict) else "a list"
        return f"{many} of {len(value)}" if value else f"an empty {many.split()[-1]}"
    if type(value) is int and abs(value) > 10**_VALUE_LETTERS:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(short(value, _VALUE_LETTERS)) if isinstance(value, str) else short(value, _VALUE_LETTERS)


def _place(at: At) -> str:
    """``stages.train.files`` of a place."""
    parts: list[Any] = []
    while at:
        at, part = at
        parts.append(part)
    return short(".".join(str(part) for part in _bounded(reversed(parts))), 4 * _VALUE_LETTERS)


def _bounded(parts: Iterable[Any]) -> Iterable[Any]:
    return (short(part, _VALUE_LETTERS) if isinstance(part, str) else part for part in parts)
