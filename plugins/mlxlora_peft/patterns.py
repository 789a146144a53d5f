"""Ranks and alphas that differ by module: patterns of a config, matched as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_core.files import show_key, show_value

_LETTERS, _PATTERNS, _REPEATING = 512, 5_000, 32
_LARGEST = 1e9
# A pattern is an expression of somebody else's, and some take longer than anybody lives. These do not:
# letters, dots, classes, digits before a dot, groups of alternatives without repetition, and one ".*".
_SAFE = re.compile(
    r"\^?(?:\.\*|(?:\\d|\[0-9\])(?:\+(?=\\?\.))?|[\w.\-]|\\[.\-_]|\[[\w\-]+\]"
    r"|\((?:\?:)?(?:[\w.\-|]|\\[.\-_])++\))*+\$?",
    re.ASCII,
)


class Patterns:
    """Numbers by module.

    Args:
        key: of the config, for messages.
        held: pattern -> number, as the config has them.
        least: what a number must be above.

    Raises:
        ModelError: they are none, or are not read.
    """

    def __init__(self, key: str, held: Any, least: float) -> None:
        self._found: dict[str, float] = {}
        if held is None:
            return
        if not isinstance(held, dict) or len(held) > _PATTERNS:
            raise ModelError(f"{key} is {show_value(held)}, wanted a table of patterns and numbers")
        if sum("*" in pattern or "+" in pattern for pattern in held) > _REPEATING:
            raise ModelError(f"{key} has more than {_REPEATING} patterns with * or +")
        odd = [
            f"{show_key(pattern)}: {show_value(n)}" for pattern, n in held.items() if not _is_number(n, least)
        ]
        if odd:
            raise ModelError(f"{key} has {listing(odd, 3)}, wanted numbers above {least:g}")
        strange = [show_key(pattern) for pattern in held if not _is_safe(pattern)]
        if strange:
            what = "which is more than names, classes, digits, alternatives and one .*"
            raise ModelError(f"{key} has the patterns {listing(strange, 3)}, {what}: not read")
        self._found = dict(held)
        self._compiled = {p: re.compile(rf"(.*\.)?({p})$") for p in held}

    def get(self, path: str, default: float) -> float:
        """The number of a module: that of the first pattern that matches its path.

        Args:
            path: as in the base model, such as ``model.layers.0.self_attn.q_proj``.
            default: of a module that no pattern matches.
        """
        for pattern, number in self._found.items():
            if self._compiled[pattern].match(path):
                return number
        return default


def most_common(numbers: Mapping[str, Any], first: Any = None) -> Any:
    """The value that most have, and of several ``first``, or the one that comes first."""
    counted: dict[Any, int] = {}
    for value in numbers.values():
        counted[value] = counted.get(value, 0) + 1
    return max(counted, key=lambda value: (counted[value], value == first))


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least < value < _LARGEST


def _is_safe(pattern: str) -> bool:
    if len(pattern) > _LETTERS or not _SAFE.fullmatch(pattern) or pattern.count(".*") > 1:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
