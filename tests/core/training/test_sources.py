"""Rows as people hand them over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DataError, MlxloraError, UsageError
from mlxlora_core.training.sources import sources

ROWS = [{"text": "a"}, {"text": "b"}]


def test_a_folder_is_asked_for_all_splits(tmp_path: Path) -> None:
    wanted = {"train": tmp_path / "train.jsonl", "valid": tmp_path / "valid.jsonl"}
    assert sources(tmp_path, "train", "valid") == sources(str(tmp_path), "train", "valid") == wanted


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []])
def test_rows_are_those_of_the_first_split(rows: list[dict[str, str]]) -> None:
    assert sources(rows, "test") == sources(tuple(rows), "test") == {"test": rows}
    assert sources(iter(rows), "train", "valid") == {"train": rows}


def test_of_several_splits_those_asked_for_are_taken() -> None:
    data = {"train": ROWS, "valid": iter(ROWS[:1]), "test": ROWS[1:]}
    assert sources(data, "train", "valid") == {"train": ROWS, "valid": ROWS[:1]}
    assert sources(data, "test") == {"test": ROWS[1:]}
    assert sources({"train": ROWS}, "train", "valid") == {"train": ROWS}


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, DataError, "train rows: wanted a list of rows such as {'text': …}, got NoneType"),
        (7, DataError, "got int"),
        (b"data", DataError, "got bytes"),
        ({"train": "data/train.jsonl"}, DataError, "got str"),
        ({"train": ROWS[0]}, DataError, "got dict"),
        ({"train": ROWS, "valid": Path("valid.jsonl")}, DataError, "valid rows: wanted"),
        ({"valid": ROWS}, DataError, "there are no train rows (there are valid)"),
        ({"train": ROWS, "validation": ROWS}, UsageError, "no split 'validation' (did you mean 'valid'?"),
        ({"text": "a"}, UsageError, "no split 'text' ("),
        ({}, DataError, "there are no train rows (there are none)"),
    ],
)
def test_what_is_none_is_refused(data: Any, error: type[MlxloraError], words: str) -> None:
    with pytest.raises(error) as caught:
        sources(data, "train", "valid")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_split_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no split '\.\./other' \(there is train, valid, test\)"):
        sources(tmp_path, "../other")
