"""The catalogue of faults and the tests agree."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS / "faults" / "README.md"
NUMBERS = [*range(1, 123), *range(140, 151)]  # 123 to 139 are the HTTP server
ROWS = re.findall(r"^\| (\d+) \| ([^|]+) \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)


@cache
def names(path: str) -> set[str]:
    """The tests of a file, those of a class among them."""
    tree = ast.parse((TESTS / path).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_number_has_one_row() -> None:
    assert [int(number) for number, _, _ in ROWS] == NUMBERS


@pytest.mark.parametrize(("number", "fault", "cell"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_tests_that_there_are_or_says_why_it_has_none(number: str, fault: str, cell: str) -> None:
    found = re.findall(r"([\w/]+\.py)::(\w+)", cell)
    assert found or cell.startswith("Does not apply: ")
    for path, name in found:
        assert (TESTS / path).is_file(), path
        assert name.startswith("test_") and name in names(path), f"{path} has no {name}"
