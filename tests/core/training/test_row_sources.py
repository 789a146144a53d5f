"""Rows as people hand them over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DataError, MlxloraError, UsageError
from mlxlora_core.training.sources import SplitRows, columns_from, read_data

ROWS = [{"text": "a"}, {"text": "b"}]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(read: Mapping[str, SplitRows]) -> dict[str, list[Any]]:
    return {split: [content for _, content in held.rows] for split, held in read.items()}


def training(data: Any) -> dict[str, SplitRows]:
    """As ``mlxlora train`` reads."""
    return read_data(data, ("train",), ("valid", "test"))


@pytest.mark.parametrize("text", [False, True])
def test_of_a_folder_the_splits_that_there_are_are_read(tmp_path: Path, text: bool) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "val.jsonl", ROWS[:1])
    write(tmp_path / "more.jsonl", ROWS)
    read = training(str(tmp_path) if text else tmp_path)
    assert contents(read) == {"train": ROWS, "valid": ROWS[:1]}
    assert list(read["train"].rows)[1][0] == f"{tmp_path}/train.jsonl:2"
    assert read["train"].notes == (f"not read: more.jsonl of {tmp_path}",)


def test_a_file_is_the_rows_of_the_first_split(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert contents(training(path)) == {"train": ROWS}
    assert contents(read_data(path, ("test",))) == {"test": ROWS}
    with pytest.raises(DataError, match=r"all of it is train rows; test rows are wanted too"):
        read_data(path, ("train", "test"), ("valid",))


def test_a_folder_without_names_of_splits_is_all_of_the_first(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS[:1])
    write(tmp_path / "b.jsonl", ROWS[1:])
    (read,) = training(tmp_path).values()
    assert contents({"train": read}) == {"train": ROWS}
    told = f"no file of {tmp_path} is named after a split: all rows are train rows (a.jsonl, b.jsonl)"
    assert read.notes == (told,)


def test_a_split_may_lie_in_parts(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:])
    (read,) = training(tmp_path).values()
    assert contents({"train": read}) == {"train": ROWS}
    assert list(read.rows)[1][0] == f"{tmp_path}/train-00001-of-00002.jsonl:1" and read.notes == ()


def test_a_split_without_rows_is_none(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "valid.jsonl").write_text("\n \n")
    assert contents(training(tmp_path)) == {"train": ROWS}
    with pytest.raises(DataError, match=r"valid\.jsonl: there is no row in it but 2 blank lines"):
        read_data(tmp_path, ("train", "valid"))


def test_a_split_that_must_be_there_is_missed(tmp_path: Path) -> None:
    write(tmp_path / "valid.jsonl", ROWS)
    with pytest.raises(DataError, match=r"there is no train\.jsonl .*there is valid\.jsonl\)"):
        training(tmp_path)
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"there is no test\.jsonl"):
        read_data(tmp_path, ("train", "test"), ("valid",))


def test_what_is_wrong_with_any_split_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"txt": 1}, *ROWS, {"txt": 1}])
    write(tmp_path / "valid.jsonl", [{"text": 1}])
    write(tmp_path / "test.jsonl", [{"text": None}])
    with pytest.raises(DataError) as caught:
        training(tmp_path)
    text = str(caught.value)
    assert text.startswith("4 bad lines: ")
    for words in ("train.jsonl:1: needs", "(2 of this kind: 1, 4)", "valid.jsonl:1: ", "test.jsonl:1: "):
        assert words in text


def test_files_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes('{"text": "a"}'.encode("utf-16"))
    (tmp_path / "valid.jsonl").mkdir()
    with pytest.raises(DataError, match=r"train\.jsonl: is UTF-16.*valid\.jsonl: is a folder"):
        training(tmp_path)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_rows_are_those_of_the_first_split(rows: list[dict[str, str]]) -> None:
    assert (
        contents(read_data(rows, ("test",))) == contents(read_data(tuple(rows), ("test",))) == {"test": rows}
    )
    assert contents(training(iter(rows))) == {"train": rows}


def test_of_several_splits_those_asked_for_are_taken() -> None:
    data = {"train": ROWS, "valid": ROWS[:1], "test": ROWS[1:]}
    assert contents(read_data(data, ("train",), ("valid",))) == {"train": ROWS, "valid": ROWS[:1]}
    assert contents(read_data(data, ("test",))) == {"test": ROWS[1:]}
    assert contents(training({"train": ROWS, "valid": []})) == {"train": ROWS}


def test_rows_in_memory_and_in_a_file_are_read_alike(tmp_path: Path) -> None:
    rows = [{"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    (one,) = training(rows).values()
    (two,) = training(write(tmp_path / "rows.jsonl", rows)).values()
    assert [content for _, content in one.rows] == [content for _, content in two.rows]
    assert (
        one.notes
        == two.notes
        == (
            "1 train row of conversations, read as messages",
            "train: keys that are not read: id (1 row)",
        )
    )
    columns = columns_from({"messages": "conversations"})
    (mapped,) = read_data(rows, ("train",), columns=columns).values()
    assert mapped.parts == one.parts


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, DataError, "train rows: wanted a list of rows such as {'text': …}, got NoneType"),
        (7, DataError, "got int"),
        (b"data", DataError, "got bytes"),
        ([], DataError, "train rows: there is no row"),
        ([{"txt": 1}, {"text": 1}, 7], DataError, "3 bad lines: train row 1: needs text"),
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
        training(data)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_split_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no split '\.\./other' \(there is train, valid, test\)"):
        read_data(tmp_path, ("../other",))


def test_columns_that_mean_nothing_are_a_matter_of_usage() -> None:
    assert columns_from(["prompt=a"]) == columns_from({"prompt": "a"}) == {"prompt": "a"}
    assert columns_from("prompt=a,completion=b") == {"prompt": "a", "completion": "b"}
    with pytest.raises(UsageError, match="--columns: nothing is read as 'x'"):
        columns_from(["x=a"], "--columns")
