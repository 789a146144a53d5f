"""An error is one line that fits a screen, whatever it quotes."""

from __future__ import annotations

import pytest

from mlxlora_core.errors import LINE_BYTES, ModelError, bounded, short


@pytest.mark.parametrize("letter", ["x", "\x1b", "é", "\U0001f600", "\ud800", "\n", "\u202e"])
@pytest.mark.parametrize("part", ["what", "where", "fix"])
def test_whatever_is_long_loses_its_middle(letter: str, part: str) -> None:
    said = {"what": "is odd", "where": "/a/model", "fix": "mend it"}
    error = ModelError(**{**said, part: "begin" + letter * 3_000_000 + "end"})
    line = str(error)
    assert len(line.encode()) <= LINE_BYTES and line.isprintable()
    assert "begin" in line and "end" in line and " … " in line
    assert all(text in line for key, text in said.items() if key != part)


def test_all_parts_are_cut_where_all_are_long() -> None:
    line = str(ModelError("a" * 5000, where="b" * 5000, fix="c" * 100))
    assert len(line.encode()) <= LINE_BYTES and "c" * 100 in line
    assert 800 < line.count("a") < 1000 and 800 < line.count("b") < 1000


@pytest.mark.parametrize("count", [0, 1, 600, LINE_BYTES])
def test_what_fits_stays_as_it_is(count: int) -> None:
    assert bounded("x" * count) == "x" * count
    assert bounded("x" * (count // 2), "y" * (count // 2)) == "x" * (count // 2) + "y" * (count // 2)


def test_a_short_text() -> None:
    assert short("abc", 3) == "abc" and short("abcd", 3) == "ab…" and short(12345, 4) == "123…"
