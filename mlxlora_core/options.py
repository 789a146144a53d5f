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
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from mlxlora_core.errors import UsageError, listing, nearest
from mlxlora_core.path_text import check_path, path_text, text_path

T = TypeVar("T")

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_SHOWN_LETTERS = 80  # so much of a wrong value is told
_LARGEST = 2**63 - 1  # of a whole number in the files that mlxlora writes and reads back
_LEAST, _MOST = 1e-37, 1e38  # a float32, in which models compute, makes 0 or infinity of what is beyond


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
        help: one sentence without a full stop.
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
            default=_default(field),
            help=field.metadata.get("help", ""),
            unit=field.metadata.get("unit", ""),
            allowed=_allowed(field.metadata),
            letter=field.metadata.get("letter", ""),
        )
        for field in dataclasses.fields(options)
        if field.init
    ]


def check_declaration(options: Any) -> str:
    """What is wrong with a class that should declare options, or nothing.

    Every type must be one that recipes and command lines can write, and every
    default must keep the rules of its own option.
    """
    if not isinstance(options, type):
        return f"must be a dataclass, got {options!r}"
    if "__dataclass_fields__" not in vars(options):
        # Below a dataclass, a class that is none loses its own fields in silence.
        return f"must be a dataclass, and {options.__name__} lacks @dataclass(frozen=True)"
    if not vars(options)["__dataclass_params__"].frozen:
        return f"must be frozen, and {options.__name__} lacks @dataclass(frozen=True)"
    rules = {field.name: field.metadata for field in dataclasses.fields(options)}
    for known in explain(options):
        if not _supported(known.type):
            return f"has '{known.name}' of type {_type_name(known.type)}, wanted {_SUPPORTED}"
        try:
            if not known.required:
                _check_range(convert(known.default, known.type), rules[known.name])
        except ValueError as fault:
            return f"has a wrong default for '{known.name}': {fault}"
    return ""


def parse(
    options: type[T],
    values: Mapping[str, Any],
    *,
    owner: str,
    where: str = "",
    spell: Callable[[str], str] | None = None,
    strict: bool = False,
    beside: Sequence[str] = (),
) -> T:
    """Make an options value from recipe or command-line values, or from a config.

    Strings are converted to the declared type; everything that is wrong is
    collected and told at once.

    Args:
        options: the dataclass that declares the options.
        values: name -> value; a value is a string or already of its type.
        owner: whom the options belong to, for messages: ``adapter 'lora'``.
        where: the file that the values came from.
        spell: an option as the user wrote it, for messages; ``OWNER option 'NAME'`` by default.
        strict: take values as they are: a text is then no number, nor a list.
        beside: names that could have been written in the same place, for messages.

    Raises:
        UsageError: unknown names, wrong types, values out of range, missing values.
    """
    spell = spell or (lambda name: f"{owner} option '{name}'")
    known = {o.name: o for o in explain(options)}
    rules = {field.name: field.metadata for field in dataclasses.fields(options)}  # type: ignore[arg-type]  # a dataclass
    faults: list[str] = []
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            there_is = listing([*known, *beside], 20)
            faults.append(
                f"{owner} has no option '{name}' ({nearest(name, [*known, *beside])}it has {there_is})"
            )
            continue
        try:
            if strict:
                _refuse_text(value, known[name])
            parsed[name] = convert(value, known[name].type)
            _check_range(parsed[name], rules[name])
        except ValueError as fault:
            faults.append(f"{spell(name)}: {fault}")
    faults += [
        f"{spell(o.name)} is required: {o.help}"
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
    if _is_union(wanted):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        wanted = next(kind for kind in get_args(wanted) if kind is not type(None))
    if get_origin(wanted) is tuple:
        return tuple(convert(item, get_args(wanted)[0]) for item in items(value))
    if wanted not in _READERS:
        raise TypeError(f"an option cannot be of type {wanted}, wanted {_SUPPORTED}")
    return _READERS[wanted](value)


def _refuse_text(value: Any, wanted: Option) -> None:
    """Raise ValueError for a text that only :func:`convert` would make something else of."""
    if isinstance(value, str) and wanted.type_name.removesuffix(" or none") not in ("text", "path"):
        raise ValueError(f"wanted {wanted.type_name}, got {_shown(value)}")


def divide(values: Mapping[str, T], options: type[Any]) -> tuple[dict[str, T], dict[str, T]]:
    """The values that ``options`` declares, and the others."""
    known = {option.name for option in explain(options)}
    ours = {name: value for name, value in values.items() if name in known}
    return ours, {name: value for name, value in values.items() if name not in known}


def plain(value: Any) -> Any:
    """``value`` with dataclasses, tuples and paths turned into what JSON and TOML hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return path_text(value) if isinstance(value, Path) else value


def items(value: Any) -> list[Any]:
    """The items of a list, or of the text of one: ``a,b`` or ``["a", "b"]``.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        raise ValueError(f"wanted a list, got {_shown(value)}")
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
    raise ValueError(f"wanted true or false, got {_shown(value)}")


def _int(value: Any) -> int:
    number = value
    if isinstance(value, str):
        with suppress(ValueError):
            number = int(value)
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"wanted a whole number, got {_shown(value)}")
    if not -_LARGEST - 1 <= number <= _LARGEST:
        raise ValueError(f"wanted a whole number of at most 2^63 - 1, got {_shown(value)}")
    return number


def _float(value: Any) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (number == 0 or _LEAST <= abs(number) <= _MOST):
            return number
        if math.isfinite(number):
            raise ValueError(f"wanted 0 or a number from {_LEAST} to {_MOST}, got {_shown(value)}")
    raise ValueError(f"wanted a finite number, got {_shown(value)}")


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"wanted text, got {_shown(value)}")


def _path(value: Any) -> Path:
    if not isinstance(value, (str, Path)):
        raise ValueError(f"wanted a path, got {_shown(value)}")
    check_path(str(value))
    try:
        return text_path(str(value)).expanduser()
    except RuntimeError as fault:  # ~ of a user that is not there
        raise ValueError(f"wanted a path, got {str(value)!r} ({fault})") from fault


_READERS = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
_SUPPORTED = "one of bool, int, float, str, Path, a tuple[X, ...] of these, or any of them | None"


def _supported(kind: Any) -> bool:
    """Whether an option can be of this type."""
    if _is_union(kind):
        inner = [k for k in get_args(kind) if k is not type(None)]
        return len(inner) == 1 and len(get_args(kind)) == 2 and _supported(inner[0])
    if get_origin(kind) is tuple:
        arguments = get_args(kind)
        return len(arguments) == 2 and arguments[1] is Ellipsis and arguments[0] in _READERS
    return kind in _READERS


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, made by its factory if it has one; or MISSING."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long; Python does not write integers of thousands of digits."""
    too_long = sys.int_info.default_max_str_digits
    if isinstance(value, int) and value.bit_length() > 3 * too_long:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


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
            raise ValueError(f"must be {_allowed(rules)}, got {_shown(item)}")


def _allowed(rules: Mapping[str, Any]) -> str:
    if rules.get("choices") is not None:
        return "one of " + ", ".join(str(choice) for choice in rules["choices"])
    words = [
        f"{word} {rules[key]}"
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
    if _is_union(kind):
        return " or ".join("none" if k is type(None) else _type_name(k) for k in get_args(kind))
    if get_origin(kind) is tuple and get_args(kind)[1:] == (Ellipsis,):
        return f"list of {_type_name(get_args(kind)[0])}"
    return {str: "text", Path: "path", int: "integer", float: "number", bool: "true/false"}.get(
        kind, str(kind)
    )
