"""Which file of a folder is which split."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxlora_core.errors import DataError
from mlxlora_core.files.data_path import absence, find_data


def names(folder: Path, *files: str) -> tuple[dict[str, str], list[str]]:
    """The names that stand for splits, and the others, of a folder with these files."""
    for name in files:
        (folder / name).touch()
    found = find_data(folder)
    splits = {split: "+".join(path.name for path in paths) for split, paths in found.splits.items()}
    return splits, [path.name for path in found.others]


@pytest.mark.parametrize(
    ("files", "splits", "others"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], ["train.jsonl", "valid.jsonl", "test.jsonl"], []),
        (["train.jsonl", "val.jsonl"], ["train.jsonl", "val.jsonl"], []),
        (["train.jsonl", "validation.jsonl"], ["train.jsonl", "validation.jsonl"], []),
        (["train.csv", "dev.json"], ["train.csv", "dev.json"], []),
        (
            ["training.json", "eval.tsv", "testing.ndjson"],
            ["training.json", "eval.tsv", "testing.ndjson"],
            [],
        ),
        (["Train.JSONL", "Val.Json"], ["Train.JSONL", "Val.Json"], []),
        (["train.jsonl", "extra.jsonl", "notes.md"], ["train.jsonl"], ["extra.jsonl"]),
        (["train.jsonl", "dataset.json", "._train.jsonl", "dataset_info.json"], ["train.jsonl"], []),
        (["b.csv", "a.jsonl"], [], ["a.jsonl", "b.csv"]),
        (["train-0-of-2.json", "train-1-of-2.json"], ["train-0-of-2.json+train-1-of-2.json"], []),
        (["train_old.jsonl", "test-2.jsonl"], [], ["test-2.jsonl", "train_old.jsonl"]),
    ],
)
def test_files_of_a_folder(tmp_path: Path, files: list[str], splits: list[str], others: list[str]) -> None:
    found = names(tmp_path, *files)
    assert (list(found[0].values()), found[1]) == (splits, others)
    assert list(found[0]) == ["train", "valid", "test"][: len(splits)]


@pytest.mark.parametrize(
    "files",
    [
        ("valid.jsonl", "val.jsonl"),
        ("dev.json", "validation.csv"),
        ("train.json", "train.jsonl"),
        ("train-0-of-1.jsonl", "train.jsonl"),
        ("train-0-of-2.jsonl", "train-1-of-2.json"),
        ("val-0-of-2.csv", "dev-1-of-2.csv"),
    ],
)
def test_two_files_of_one_split_are_refused(tmp_path: Path, files: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"could both be the (valid|train) rows") as caught:
        names(tmp_path, *files)
    assert all(name in str(caught.value) for name in files)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["train-00001-of-00003.jsonl"], "there are 1 of 3 parts of the train rows"),
        (["val-0-of-3.csv", "val-1-of-3.csv"], "there are 2 of 3 parts of the valid rows"),
        (["test-0-of-2.csv", "test-2-of-2.csv"], "the 2 parts there are have the numbers 0, 2"),
        (["test-0-of-1.csv", "test-0-of-2.csv"], "there are 2 of 1, 2 parts of the test rows"),
    ],
)
def test_parts_that_are_missing_are_told(tmp_path: Path, files: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        names(tmp_path, *files)


def test_a_path_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    assert find_data(tmp_path / "train.jsonl").others == (tmp_path / "train.jsonl",)


@pytest.mark.parametrize("name", ["nowhere", "nowhere/data", "\0", "x" * 5000])
def test_what_is_not_there_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError):
        find_data(tmp_path / name)


@pytest.mark.parametrize("names", [(), ("train.jsonl.gz", "train.txt"), ("dataset.json", "._train.jsonl")])
def test_a_folder_without_rows_is_told_with_what_there_is(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="there is no file of rows in this folder") as caught:
        find_data(tmp_path)
    assert str(caught.value).endswith(f"there is {', '.join(sorted(names)) or 'none'}")


def test_a_split_that_is_absent_is_told_with_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    text = str(absence(tmp_path, "valid"))
    assert text.startswith(f"{tmp_path}: there is no valid.jsonl (wanted valid or validation or val or dev")
    assert "there is rows.jsonl)" in text
