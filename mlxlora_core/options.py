"""Options as frozen dataclasses: declare, explain, parse and check them.

A component declares its options once::

    @dataclass(frozen=True)
    class LoRAOptions:
        rank: int = option(8, help="rank of the update", minimum=1)

and mlxlora makes from it the help text, the checks, the recipe table and the
command-line option. Only the standard library is used here, so that listing
and explaining options loads nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from mlxlora_core.errors import UsageError, nearest, some

T = TypeVar("T")

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] | None = None,
    letter: str = "",
) -> Any:
    """A dataclass field that explains and checks itself.

    Args:
        default: the value when nobody says otherwise; left out, the option is required.
        help: one sentence without a full stop.
        unit: what the number counts, such as ``tokens``.
        minimum: smallest value allowed.
        maximum: largest value allowed.
        above: the value must be greater than this.
        below: the value must be less than this.
        choices: the values allowed.
        letter: a one-letter name on the command line.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "choices": tuple(choices) if choices is not None else None,
        "letter": letter,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class NoOptions:
    """For a component that has nothing to set."""


@dataclass(frozen=True)
class Option:
    """One declared option, as help pages and parsers see it.

    Attributes:
        name: field name, in snake case.
        type: the annotation, resolved.
        default: the default, or ``dataclasses.MISSING`` when required.
        help: one sentence.
        unit: what the number counts, or nothing.
        allowed: the range or the choices in words, or nothing.
        letter: a one-letter name on the command line, or nothing.
    """

    name: str
    type: Any
    default: Any
    help: str
    unit: str
    allowed: str
    letter: str

    @property
    def required(self) -> bool:
        """Whether a value must be given."""
        return self.default is dataclasses.MISSING

    @property
    def type_name(self) -> str:
        """The type as a person would write it: ``int``, ``list of str``, ``float or none``."""
        return _type_name(self.type)


def explain(options: type[Any]) -> list[Option]:
    """The options that a dataclass declares, in the order of declaration."""
    hints = typing.get_type_hints(options)
    return [
        Option(
            name=field.name,
            type=hints[field.name],
            default=field.default,
            help=field.metadata.get("help", ""),
            unit=field.metadata.get("unit", ""),
            allowed=_allowed(field.metadata),
            letter=field.metadata.get("letter", ""),
        )
        for field in dataclasses.fields(options)
    ]


def parse(options: type[T], values: Mapping[str, Any], *, owner: str, where: str = "") -> T:
    """Make an options value from recipe or command-line values.

    Strings are converted to the declared type; everything that is wrong is
    collected and told at once.

    Args:
        options: the dataclass that declares the options.
        values: name -> value; a value is a string or already of its type.
        owner: whom the options belong to, for messages: ``adapter 'lora'``.
        where: the file that the values came from.

    Raises:
        UsageError: unknown names, wrong types, values out of range, missing values.
    """
    known = {o.name: o for o in explain(options)}
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    faults: list[str] = []
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            faults.append(f"{owner} has no option '{name}' ({nearest(name, known)}it has {some(known)})")
            continue
        try:
            parsed[name] = convert(value, known[name].type)
            _check_range(parsed[name], fields[name].metadata)
        except ValueError as fault:
            faults.append(f"{owner} option '{name}': {fault}")
    faults += [
        f"{owner} option '{o.name}' is required: {o.help}"
        for o in known.values()
        if o.required and o.name not in values
    ]
    if not faults:
        try:
            return options(**parsed)
        except ValueError as fault:
            faults.append(f"{owner}: {fault}")
    raise UsageError("; ".join(faults), where=where)


def convert(value: Any, wanted: Any) -> Any:
    """``value`` as the type ``wanted``; strings are read, other values are checked.

    Raises:
        ValueError: with what was got and what was wanted.
    """
    if get_origin(wanted) in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        wanted = next(kind for kind in get_args(wanted) if kind is not type(None))
    if get_origin(wanted) is tuple:
        return tuple(convert(item, get_args(wanted)[0]) for item in _items(value))
    readers = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
    if wanted not in readers:
        raise TypeError(f"an option cannot be of type {wanted}")
    return readers[wanted](value)


def plain(value: Any) -> Any:
    """``value`` with dataclasses, tuples and paths turned into what JSON and TOML hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _items(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        raise ValueError(f"wanted a list, got {value!r}")
    if value.lstrip().startswith("["):
        try:
            return list(tomllib.loads(f"value = {value}")["value"])
        except tomllib.TOMLDecodeError as fault:
            raise ValueError(f"wanted a list, got {value!r} ({fault})") from fault
    return [item.strip() for item in value.split(",") if item.strip()]


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise ValueError(f"wanted true or false, got {value!r}")


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, str):
            return int(value)
    except ValueError:
        pass
    raise ValueError(f"wanted a whole number, got {value!r}")


def _float(value: Any) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"wanted a finite number, got {value!r}")


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"wanted text, got {value!r}")


def _path(value: Any) -> Path:
    if isinstance(value, Path) or (isinstance(value, str) and value):
        return Path(value).expanduser()
    raise ValueError(f"wanted a path, got {value!r}")


def _check_range(value: Any, rules: Mapping[str, Any]) -> None:
    """Raise ValueError when ``value``, or an item of it, breaks the declared rules."""
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        choices = rules.get("choices")
        low, high, above, below = (rules.get(k) for k in ("minimum", "maximum", "above", "below"))
        if (
            (choices is not None and item not in choices)
            or (low is not None and item < low)
            or (high is not None and item > high)
            or (above is not None and item <= above)
            or (below is not None and item >= below)
        ):
            raise ValueError(f"must be {_allowed(rules)}, got {item!r}")


def _allowed(rules: Mapping[str, Any]) -> str:
    if rules.get("choices") is not None:
        return "one of " + ", ".join(str(choice) for choice in rules["choices"])
    words = [
        f"{word} {rules[key]:g}"
        for key, word in (
            ("minimum", "at least"),
            ("above", "more than"),
            ("maximum", "at most"),
            ("below", "less than"),
        )
        if rules.get(key) is not None
    ]
    return " and ".join(words)


def _type_name(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join("none" if k is type(None) else _type_name(k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {_type_name(get_args(kind)[0])}"
    return {str: "text", Path: "path", int: "integer", float: "number", bool: "true/false"}.get(
        kind, str(kind)
    )
