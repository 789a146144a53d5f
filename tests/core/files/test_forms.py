"""A form takes what is sound of a value, and tells what is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from mlxlora_core.files.forms import (
    UNSOUND,
    Else,
    Flag,
    Form,
    Items,
    Map,
    Maybe,
    Number,
    Option,
    Plain,
    Strict,
    Table,
    Text,
    Whole,
    form_of,
    sound,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("form", "good", "odd"),
    [
        (Text(), ["", "x", "\ud800"], [None, 5, [], {}, True]),
        (Text(("a", "b")), ["a", "b"], ["c", ""]),
        (Flag(), [True, False], [0, 1, None, "true"]),
        (Whole(), [0, 1, 2**63 - 1], [-1, 2**63, 10**4000, 1.0, True, "1", None, NAN]),
        (Whole(least=2, most=3), [2, 3], [1, 4]),
        (Number(), [0, -1, 2.5, 1e308, 10**300, -1e-320], [NAN, INF, -INF, 10**400, True, "1", None]),
        (Number(least=0), [0, 1e-320], [-1e-320]),
        (Maybe(Whole()), [None, 1], [-1, "x"]),
        (Items(Whole()), [[], [1, 2]], [[1, "x"], {}, "ab", None]),
        (Items(Whole(), least=1, most=2), [[1], [1, 2]], [[], [1, 2, 3]]),
        (Map(Whole()), [{}, {"a": 1}], [[], 5, None]),
        (Plain(), [None, True, 1, 1.5, "x", [1, {"a": []}]], [2**63, [INF], {"a": [10**30]}, {"a": {1, 2}}]),
    ],
)
def test_what_is_sound(form: Form, good: list[Any], odd: list[Any]) -> None:
    for value in good:
        taken, faults = sound(form, value)
        assert taken == value and type(taken) is type(value) and faults == []
    for value in odd:
        taken, faults = sound(form, value)
        assert taken is UNSOUND and len(faults) == 1, value


TABLE = Table({"a": Whole(), "b": Option(Whole()), "c": Else(Map(Whole()), dict)})


@pytest.mark.parametrize(
    ("value", "taken", "faults"),
    [
        ({"a": 1, "b": 2, "c": {"x": 3}}, {"a": 1, "b": 2, "c": {"x": 3}}, []),
        ({"a": 1, "c": {}}, {"a": 1, "c": {}}, []),
        ({"a": 1}, {"a": 1, "c": {}}, ["lacks c"]),
        ({"a": 1, "b": "x", "c": 5}, {"a": 1, "c": {}}, ["b: wanted a whole number", "c: wanted an object"]),
        ({"a": 1, "c": {"x": 1, "y": None}}, {"a": 1, "c": {"x": 1}}, ["c.y: wanted a whole number"]),
        ({"c": {}}, UNSOUND, ["lacks a"]),
        (
            {"a": [], "c": {}},
            UNSOUND,
            ["a: wanted a whole number from 0 to 92"],
        ),
        ([], UNSOUND, ["wanted an object, got an empty list"]),
        ({"a": 1, "c": {}, "new": [1, "x"]}, {"a": 1, "c": {}, "new": [1, "x"]}, []),
        ({"a": 1, "c": {}, "new": NAN}, {"a": 1, "c": {}}, ["new: wanted a finite number, got nan"]),
    ],
)
def test_a_table(value: object, taken: object, faults: list[str]) -> None:
    got, told = sound(TABLE, value)
    assert got == taken and len(told) == len(faults)
    assert all(words.startswith(start) for words, start in zip(told, faults, strict=True))


def test_other_keys_of_a_table() -> None:
    value = {"a": 1, "b": 2, "c": "x"}
    assert sound(Table({"a": Whole()}, others=None), value) == ({"a": 1}, [])
    assert sound(Table({"a": Whole()}, others=Option(Whole())), value)[0] == {"a": 1, "b": 2}
    assert sound(Table({"a": Whole()}, others=Whole()), value)[0] is UNSOUND


def test_nothing_is_forgiven_inside_strict() -> None:
    assert sound(Strict(Map(Whole())), {"a": 1}) == ({"a": 1}, [])
    assert sound(Strict(Map(Whole())), {"a": 1, "b": 2.0})[0] is UNSOUND


def test_what_stands_instead_is_made_anew() -> None:
    first, second = (sound(TABLE, {"a": 1})[0] for _ in range(2))
    first["c"]["x"] = 1
    assert second["c"] == {}


def test_faults_are_short_and_few_however_many_and_long_they_are() -> None:
    value = {f"{'k' * 5000}{i}": "v" * 5000 for i in range(300)}
    taken, faults = sound(Map(Map(Whole())), {"x": value})
    assert taken == {"x": {}} and faults[-1] == "and 280 more"
    assert len(faults) == 21 and max(map(len, faults)) < 250


@dataclass(frozen=True)
class Inner:
    count: int = 0


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    flag: bool = True
    loss: float | None = None
    recent: tuple[float, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_the_form_of_a_dataclass() -> None:
    form = form_of(Outer)
    good = asdict(Outer(loss=1.5, parts={"a": 1})) | {"recent": [1.0, 2]}
    assert sound(form, good) == (good, [])
    odd = {"name": 5, "flag": 1, "loss": "x", "recent": [None], "inner": {"count": -1}}
    for key, value in odd.items():
        assert sound(form, good | {key: value})[0] is UNSOUND, key
    with pytest.raises(TypeError, match="no form for"):
        form_of(dataclass(type("Odd", (), {"__annotations__": {"x": set[int]}})))
