"""Seeded damage to what a document says: keys dropped, twice, of another type, deep, huge, not finite."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import tomli_w

_DEEP, _TWICE = "\x00deep", "\x00twice"

Place = tuple[Any, Any]  # container, key or index


def _places(value: Any) -> Iterator[Place]:
    parts: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(parts):
        yield value, key
        if isinstance(part, dict | list):
            yield from _places(part)


_OTHERS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 5, 1.5, -0.5, "", "x", "train", [], {}, [[]], [1], {"a": 1}, [None]),
    *(2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 1e308, -1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "\ud800", "\x1b[2J\x07", "\0", "../x", "/", "x" * 70_000),
    *(["x"] * 3, {"a": {"b": {"c": []}}}, [5] * 3000, _DEEP),
)


def _drop(place: Place, draw: random.Random) -> None:
    del place[0][place[1]]


def _another(place: Place, draw: random.Random) -> None:
    place[0][place[1]] = copy.deepcopy(draw.choice(_OTHERS))


def _number(place: Place, draw: random.Random) -> None:
    value = place[0][place[1]]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        changes = (
            -value,
            value + 1,
            value - 1,
            value * 10**9,
            value + 0.5,
            float(value),
            str(value),
            [value],
        )
        place[0][place[1]] = draw.choice(changes)
    else:
        _another(place, draw)


def _nest(place: Place, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 2, 70, 400))):
        place[0][place[1]] = {"a": place[0][place[1]]} if draw.random() < 0.5 else [place[0][place[1]]]


def _duplicate(place: Place, draw: random.Random) -> None:
    container, key = place
    if isinstance(container, dict):
        container[f"{_TWICE}{key}"] = draw.choice((container[key], None, 5))
    else:
        container.insert(key, container[key])


def _add(place: Place, draw: random.Random) -> None:
    container = place[0]
    if isinstance(container, dict):
        container[draw.choice(("x", "", "\x1b[31m", "a.b", "\ud800", "y" * 500))] = copy.deepcopy(
            draw.choice(_OTHERS)
        )
    else:
        container.append(copy.deepcopy(draw.choice(_OTHERS)))


def _swap(place: Place, draw: random.Random) -> None:
    container, key = place
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    other = draw.choice(keys)
    container[key], container[other] = container[other], container[key]


_CHANGES: tuple[Callable[[Place, random.Random], None], ...] = (
    *(_drop, _drop, _another, _another, _another, _number, _number, _nest, _duplicate, _add, _swap),
)


def changed(value: Any, draw: random.Random) -> Any:
    """``value`` with one to three changes of its structure."""
    whole = {"": copy.deepcopy(value)}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(whole))
        if places:
            draw.choice(_CHANGES)(draw.choice(places), draw)
    return whole.get("")


def as_json(value: Any) -> bytes:
    """JSON with what no writer of JSON makes: keys twice, NaN, a hundred thousand brackets."""
    text = json.dumps(value).replace(json.dumps(_TWICE)[1:-1], "")
    return text.replace(json.dumps(_DEEP), "[" * 100_000 + "]" * 100_000).encode()


def as_toml(value: Any) -> bytes:
    try:
        return (
            tomli_w.dumps(value).encode()
            if isinstance(value, dict)
            else str(value).encode("utf-8", "replace")
        )
    except (TypeError, ValueError, RecursionError):  # null, or half a surrogate pair
        return as_json(value)
