"""What the results of filters, methods and operators cost, found before they are made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from mlxlora_core.chat.allowance import MOST_BITS, MOST_WIDTH, Allowance, Overrun

_LONG_NUMBER = re.compile(r"\d{6,}")
_NUMBER = re.compile(r"\d+")
_MOST_DIGITS = 100  # that a number is rounded to
_MOST_INDENT = 100
_SORTING = 16  # how often a value is looked at when so many are sorted that the rest allows

Check = Callable[..., None]


def operator(allowance: Allowance, sign: str, left: Any, right: Any) -> None:
    """Count what an operator makes of two values.

    Raises:
        Overrun: it is too much.
    """
    if any(isinstance(value, int) and value.bit_length() > MOST_BITS for value in (left, right)):
        raise Overrun("it computes with numbers that are too large")
    if sign == "**":
        _power(left, right)
    elif sign == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(times, int):
                allowance.text(len(text) * max(times, 0) * (1 if isinstance(text, str) else 8))
    elif sign == "%" and isinstance(left, str):
        percent(allowance, left, right)
    elif sign == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        allowance.text((len(left) + len(right)) * (1 if isinstance(left, str) else 8))


def _power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MOST_BITS:
        raise Overrun("it computes with numbers that are too large")


def percent(allowance: Allowance, form: str, values: Any) -> None:
    """Count what ``form % values`` makes."""
    widest = _widest(form)
    if "*" in form:
        held = values if isinstance(values, tuple | list) else [values]
        widest = max(widest, *(abs(value) for value in held if isinstance(value, int)), 0)
    if widest > MOST_WIDTH:
        raise Overrun("it pads a text too far")
    parts = form.count("%")
    allowance.text(len(form) + parts * widest)
    for _ in range(parts if isinstance(values, Mapping) else 1):
        allowance.weigh(values)


def width(allowance: Allowance, spec: str) -> None:
    """Count what a value is padded to by a format such as ``>20``."""
    if _widest(spec) > MOST_WIDTH:
        raise Overrun("it pads a text too far")
    allowance.text(len(spec) + _widest(spec))


def _widest(form: str) -> int:
    """The largest number in a format."""
    if _LONG_NUMBER.search(form):
        return MOST_WIDTH + 1
    return max(map(int, _NUMBER.findall(form)), default=0)


def replaced(allowance: Allowance, text: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
    """Count what a text with other parts in it has."""
    times = str(text).count(str(old))
    allowance.text(len(str(text)) + times * len(str(new)))


def joined(allowance: Allowance, values: Any, between: Any = "", attribute: Any = None) -> None:
    """Count what values with a text between them have."""
    allowance.text(len(values) * len(str(between)) if hasattr(values, "__len__") else 0)


def padded(allowance: Allowance, text: Any, width: Any = 80, fill: Any = " ") -> None:
    """Count what a text has that is filled up to a width."""
    if isinstance(width, int):
        allowance.text(max(width, 0))


def expanded(allowance: Allowance, text: str, tabsize: Any = 8) -> None:
    """Count what a text has with spaces for its tabs."""
    if isinstance(tabsize, int):
        allowance.text(len(text) + text.count("\t") * max(tabsize, 0))


def _indented(
    allowance: Allowance, text: Any, width: Any = 4, first: Any = False, blank: Any = False
) -> None:
    size = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    allowance.text((len(str(text).splitlines()) + 1) * max(size, 0))


def _in_batches(allowance: Allowance, values: Any, count: Any = 1, fill: Any = None) -> None:
    if fill is not None and isinstance(count, int):
        allowance.text(max(count, 0) * 8)


def _rounded(allowance: Allowance, value: Any, precision: Any = 0, method: Any = "") -> None:
    if isinstance(precision, int) and abs(precision) > _MOST_DIGITS:
        raise Overrun("it rounds a number to too many digits")


def _formatted(allowance: Allowance, form: Any, *values: Any, **named: Any) -> None:
    percent(allowance, str(form), named or values)


def _summed(allowance: Allowance, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise Overrun("it adds up what are no numbers")


def _sorted(allowance: Allowance, values: Any, *more: Any, **named: Any) -> None:
    for _ in range(_SORTING):
        allowance.weigh(values)


def _as_json(
    allowance: Allowance, value: Any, ensure_ascii: Any = False, indent: Any = None, *more: Any, **named: Any
) -> None:
    size = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    if size > _MOST_INDENT:
        raise Overrun("it indents a text too far")
    for _ in range(1 + max(size, 0)):
        allowance.weigh(value)


#: filters that need all values at once
WHOLE = frozenset({"dictsort", "groupby", "join", "max", "min", "sort", "sum", "unique"})

#: filter -> what counts its result
FILTERS: Mapping[str, Check] = {
    "batch": _in_batches,
    "center": padded,
    "dictsort": _sorted,
    "format": _formatted,
    "groupby": _sorted,
    "indent": _indented,
    "join": joined,
    "max": _sorted,
    "min": _sorted,
    "replace": replaced,
    "round": _rounded,
    "sort": _sorted,
    "sum": _summed,
    "tojson": _as_json,
    "unique": _sorted,
}

#: method of texts -> what counts its result
METHODS: Mapping[str, Check] = {
    "center": padded,
    "expandtabs": expanded,
    "ljust": padded,
    "replace": replaced,
    "rjust": padded,
    "zfill": padded,
}
