"""Options: declared once, explained, parsed and checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from mlxlora_core.errors import UsageError
from mlxlora_core.options import NoOptions, check_declaration, convert, divide, explain, option, parse, plain


@dataclass(frozen=True)
class Everything:
    """One option of each kind."""

    count: int = option(8, help="how many", unit="rows", minimum=1, maximum=2**32 - 1)
    share: float = option(0.5, help="which part", above=0, below=1)
    on: bool = option(False, help="whether at all")
    mode: str = option("fast", help="how", choices=("fast", "exact"))
    names: tuple[str, ...] = option(("a", "b"), help="which")
    sizes: tuple[int, ...] = option((1,), help="how large", minimum=1)
    clip: float | None = option(None, help="largest norm", above=0)
    file: Path | None = option(None, help="where")


@dataclass(frozen=True)
class Needs:
    """An option without a default, and a rule over two."""

    path: Path = option(help="the file to read")
    low: int = option(1, help="lower end")
    high: int = option(2, help="upper end")

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low must be at most high ({self.high}), got {self.low}")


def read(kind: type[Any] = Everything, **values: Any) -> Any:
    return parse(kind, values, owner="adapter 'x'", where="recipe.toml:3")


def fault(kind: type[Any] = Everything, **values: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(kind, **values)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- what is declared ---------------------------------------------------------


def test_explain_tells_everything_that_was_declared() -> None:
    known = {o.name: o for o in explain(Everything)}
    assert list(known) == ["count", "share", "on", "mode", "names", "sizes", "clip", "file"]
    count = known["count"]
    assert (count.type_name, count.default, count.help, count.unit) == ("integer", 8, "how many", "rows")
    assert count.allowed == "at least 1 and at most 4294967295"
    assert known["share"].allowed == "more than 0 and less than 1"
    assert known["mode"].allowed == "one of fast, exact"
    assert known["names"].type_name == "list of text"
    assert known["clip"].type_name == "number or none"
    assert [o.name for o in explain(Needs) if o.required] == ["path"]
    assert explain(NoOptions) == []


def test_a_plain_dataclass_declares_options_too() -> None:
    @dataclass(frozen=True)
    class Plain:
        rank: int = 3
        names: tuple[str, ...] = dataclasses.field(default_factory=lambda: ("x",))
        made: int = dataclasses.field(default=0, init=False)

    # explain() resolves annotations where the class stands, as it does for any module.
    known = {o.name: o for o in explain(Plain)}
    assert list(known) == ["rank", "names"]
    assert not known["names"].required
    assert known["names"].default == ("x",)
    assert read(Plain).names == ("x",)


# --- good values --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "16", 16),
        (int, "-1", -1),
        (float, "1e-4", 1e-4),
        (float, 3, 3.0),
        (bool, "true", True),
        (bool, "Off", False),
        (str, "none", "none"),
        (float | None, "none", None),
        (float | None, None, None),
        (Optional.__getitem__(int), "7", 7),
        (tuple[str, ...], "a, b,c", ("a", "b", "c")),
        (tuple[str, ...], "", ()),
        (tuple[str, ...], '["a, b", "c"]', ("a, b", "c")),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[float, ...] | None, "0.5", (0.5,)),
        (Path, "~/x", Path.home() / "x"),
        (Path, Path("x"), Path("x")),
    ],
)
def test_values_are_read(kind: Any, text: Any, value: Any) -> None:
    got = convert(text, kind)
    assert got == value
    assert type(got) is type(value)


def test_parse_fills_in_defaults() -> None:
    assert read() == Everything()
    assert read(count="3", names=["wq"], clip="1.0") == Everything(count=3, names=("wq",), clip=1.0)
    assert read(Needs, path="f").path == Path("f")


def test_the_edges_of_a_range_belong_to_it_or_not() -> None:
    assert read(count=1, sizes=[1]).count == 1
    assert read(count=2**32 - 1).count == 2**32 - 1
    assert "must be at least 1 and at most 4294967295, got 4294967296" in fault(count=2**32)
    assert "must be more than 0 and less than 1, got 0.0" in fault(share=0)
    assert "got 1.0" in fault(share=1)
    assert "must be at least 1, got 0" in fault(sizes=[3, 0])


# --- bad values ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": "many"}, "option 'count': wanted a whole number, got 'many'"),
        ({"count": 3.0}, "wanted a whole number, got 3.0"),
        ({"count": True}, "wanted a whole number, got True"),
        ({"count": "9" * 5000}, "wanted a whole number"),
        ({"share": "nan"}, "wanted a finite number, got 'nan'"),
        ({"share": "inf"}, "wanted a finite number"),
        ({"share": 10**400}, "wanted a finite number"),
        ({"share": 10**9999}, "wanted a finite number, got an integer of 33216 bits"),
        ({"count": 10**9999}, "got an integer of 33216 bits"),
        ({"share": True}, "wanted a finite number, got True"),
        ({"on": "maybe"}, "wanted true or false, got 'maybe'"),
        ({"on": 1}, "wanted true or false, got 1"),
        ({"mode": "slow"}, "must be one of fast, exact, got 'slow'"),
        ({"mode": 3}, "wanted text, got 3"),
        ({"names": 3}, "wanted a list, got 3"),
        ({"names": "[a"}, "wanted a list, got '[a'"),
        ({"names": [1]}, "wanted text, got 1"),
        ({"clip": 0}, "must be more than 0, got 0.0"),
        ({"file": ""}, "wanted a path, got ''"),
        ({"file": "a\0b"}, "wanted a path"),
        ({"file": "a" * 300}, f"wanted a path, got '{'a' * 79}…' (File name too long)"),
        ({"file": "absent/" + "a" * 300}, "(File name too long)"),
        ({"file": "~no-such-user-here/x"}, "wanted a path, got '~no-such-user-here/x'"),
        ({"file": 3}, "wanted a path, got 3"),
        ({"cuont": 3}, "has no option 'cuont' (did you mean 'count'? it has count, share,"),
    ],
)
def test_bad_values_say_what_was_got_and_wanted(values: dict[str, Any], words: str) -> None:
    message = fault(**values)
    assert words in message
    assert message.startswith("recipe.toml:3: adapter 'x'")
    assert "\n" not in message


def test_all_faults_are_told_at_once() -> None:
    message = fault(count=0, share="x", nmaes=[], on=2)
    for words in ("'count'", "'share'", "'nmaes' (did you mean 'names'?", "'on'"):
        assert words in message


def test_what_is_required_and_rules_over_several_options() -> None:
    assert "option 'path' is required: the file to read" in fault(Needs)
    assert "adapter 'x': low must be at most high (2), got 5" in fault(Needs, path="f", low=5)


# --- declarations that cannot work --------------------------------------------


def declared(annotation: Any, default: Any = dataclasses.MISSING, **rules: Any) -> type[Any]:
    return dataclasses.make_dataclass(
        "Made", [("it", annotation, option(default, help="x", **rules))], frozen=True
    )


@pytest.mark.parametrize("kind", [Everything, Needs, NoOptions])
def test_good_declarations(kind: type[Any]) -> None:
    assert check_declaration(kind) == ""


@pytest.mark.parametrize(
    "annotation",
    [
        dict,
        list[str],
        tuple[int, int],
        tuple[tuple[int, ...], ...],
        tuple,
        int | str,
        int | str | None,
        Literal["a"],
        Any,
    ],
)
def test_types_that_no_recipe_can_write(annotation: Any) -> None:
    assert "has 'it' of type" in check_declaration(declared(annotation))


def test_defaults_keep_their_own_rules() -> None:
    assert "wrong default for 'it': must be at least 1, got 0" in check_declaration(
        declared(int, 0, minimum=1)
    )
    assert "wrong default for 'it': wanted a whole number, got 'x'" in check_declaration(declared(int, "x"))
    assert "wrong default for 'it'" in check_declaration(declared(int, None))


def test_classes_that_are_no_frozen_dataclass() -> None:
    class Bare:
        rank: int = 8

    class Below(Everything):
        rank: int = 8

    @dataclass
    class Loose:
        rank: int = 8

    assert "Bare lacks @dataclass(frozen=True)" in check_declaration(Bare)
    assert "Below lacks @dataclass(frozen=True)" in check_declaration(Below)
    assert "Loose lacks @dataclass(frozen=True)" in check_declaration(Loose)
    assert "must be a dataclass" in check_declaration({"rank": 8})


def test_plain_turns_options_into_what_json_holds() -> None:
    assert plain(Everything(file=Path("a/b"))) == {
        "count": 8,
        "share": 0.5,
        "on": False,
        "mode": "fast",
        "names": ["a", "b"],
        "sizes": [1],
        "clip": None,
        "file": "a/b",
    }


def test_values_are_divided_by_what_declares_them() -> None:
    ours, others = divide({"count": 1, "other": 2}, Everything)
    assert (ours, others) == ({"count": 1}, {"other": 2})
    assert divide({}, Everything) == ({}, {})
