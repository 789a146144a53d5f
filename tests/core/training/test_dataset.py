from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DataError
from mlxlora_core.files.data_path import SPLITS
from mlxlora_core.files.rows import read_rows
from mlxlora_core.plugins.sections import SplitConfig
from mlxlora_core.training.dataset import write_dataset
from mlxlora_core.values import Row, Rows, Skipped


def texts(count: int) -> list[Row]:
    return [Row({"text": f"row {i}"}) for i in range(count)]


def write(folder: Path, rows: Iterable[Row], **options: Any) -> dict[str, Any]:
    return write_dataset(Rows(list(rows)), folder, SplitConfig(**options), {"builder": "test"})


def contents(folder: Path) -> dict[str, list[Any]]:
    """The rows of each split, as a reader of JSON Lines finds them."""
    found = {}
    for split in SPLITS:
        lines = (folder / f"{split}.jsonl").read_bytes().split(b"\n")
        assert lines.pop() == b""
        found[split] = [json.loads(line) for line in lines]
    return found


def test_rows_are_split_once_in_the_order_they_came(tmp_path: Path) -> None:
    record = write(tmp_path, texts(200))
    found = contents(tmp_path)
    assert [len(found[split]) for split in SPLITS] == [180, 10, 10]
    every = [row["text"] for split in SPLITS for row in found[split]]
    assert sorted(every) == sorted(f"row {i}" for i in range(200))
    numbers = [int(row["text"][4:]) for row in found["train"]]
    assert numbers == sorted(numbers)
    assert record["rows"] == {"train": 180, "valid": 10, "test": 10}
    assert json.loads((tmp_path / "dataset.json").read_text()) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dataset.json",
        "test.jsonl",
        "train.jsonl",
        "valid.jsonl",
    ]


@pytest.mark.parametrize(
    ("count", "size", "want"),
    [
        (1, 0.1, [1, 0, 0]),
        (2, 0.1, [1, 1, 0]),
        (3, 0.1, [1, 1, 1]),
        (10, 0.1, [8, 1, 1]),
        (30, 0.1, [27, 2, 1]),
        (100, 0.1, [90, 5, 5]),
        (10, 0.9, [1, 5, 4]),
        (3, 0.99, [1, 1, 1]),
        (50, 0.0, [50, 0, 0]),
    ],
)
def test_sets_of_any_size_split_sensibly(tmp_path: Path, count: int, size: float, want: list[int]) -> None:
    write(tmp_path, texts(count), test_set_size=size)
    assert [len(rows) for rows in contents(tmp_path).values()] == want


def test_the_bytes_depend_on_rows_and_options_alone(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    write(folders[0], texts(100))
    write(folders[1], texts(100), write_batch_size=7)
    write(folders[2], texts(100), split_seed=1)
    write(folders[3], [*texts(100), Row({"text": "one more"})])

    def lines(folder: Path) -> list[set[bytes]]:
        return [set((folder / f"{split}.jsonl").read_bytes().split(b"\n")) for split in SPLITS]

    for split in SPLITS:
        assert (folders[0] / f"{split}.jsonl").read_bytes() == (folders[1] / f"{split}.jsonl").read_bytes()
    assert lines(folders[0]) != lines(folders[2])
    moved = sum(len(a - b) for a, b in zip(lines(folders[0]), lines(folders[3]), strict=True))
    assert moved <= 2


def test_no_group_stands_in_two_splits(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [Row({"text": f"row {i}"}, group=f"g{draw.randrange(60)}") for i in range(400)]
    write(tmp_path, rows, test_set_size=0.4)
    group = {row.content["text"]: row.group for row in rows}
    seen = [{group[row["text"]] for row in found} for found in contents(tmp_path).values()]
    assert all(seen)
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_groups_that_share_a_row_are_one(tmp_path: Path) -> None:
    # b's row 1 is a's row 1: were they drawn apart, row 1 would stand beside its own group's test rows.
    for seed in range(20):
        chain = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("c", 3), ("c", 2)]
        rows = [Row({"text": f"row {i}"}, group=name) for name, i in chain]
        record = write(tmp_path, [*rows, *texts(9)[5:]], test_set_size=0.5, split_seed=seed)
        where = {row["text"]: split for split, found in contents(tmp_path).items() for row in found}
        assert len({where[f"row {i}"] for i in range(4)}) == 1
        assert record["groups"] == 5


def test_repeated_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [Row({"prompt": "p", "completion": "c"}), Row({"completion": "c", "prompt": "p"}), *texts(5)]
    record = write(tmp_path, [*rows, *texts(5)])
    assert record["repeated_rows"] == 6
    assert sum(record["rows"].values()) == 6


def test_splits_of_the_source_are_kept_and_overlap_is_told(tmp_path: Path) -> None:
    rows = [
        Row({"text": "a"}, split="train"),
        Row({"text": "b"}, split="train"),
        Row({"text": "c"}),
        Row({"text": "a"}),
        Row({"text": "a"}, split="valid"),
        Row({"text": "d"}, split="test"),
    ]
    record = write(tmp_path, rows)
    found = {split: [row["text"] for row in rows] for split, rows in contents(tmp_path).items()}
    assert found == {"train": ["a", "b", "c"], "valid": ["a"], "test": ["d"]}
    assert (record["rows_in_two_splits"], record["repeated_rows"]) == (1, 1)


def test_extra_rows_are_trained_on_and_held_out_nowhere(tmp_path: Path) -> None:
    extra = [Row({"text": f"general {i}"}) for i in range(40)]
    config = SplitConfig(test_set_size=0.5)
    record = write_dataset(Rows(texts(20)), tmp_path / "a", config, {}, [*extra, extra[0]])
    write_dataset(Rows(texts(20)), tmp_path / "b", config, {})
    added, plain = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert added["train"] == [*plain["train"], *(dict(row.content) for row in extra)]
    assert (added["valid"], added["test"]) == (plain["valid"], plain["test"])
    assert (record["rows"]["train"], record["extra_rows"], record["groups"]) == (50, 41, 20)


def test_an_extra_row_that_is_held_out_is_told(tmp_path: Path) -> None:
    held_out = Row({"text": "a"}, split="valid")
    rows = Rows([held_out, Row({"text": "b"}, split="train")])
    record = write_dataset(rows, tmp_path, SplitConfig(), {}, [Row({"text": "a"}), Row({"text": "b"})])
    assert [row["text"] for row in contents(tmp_path)["train"]] == ["b", "a"]
    assert record["rows_in_two_splits"] == 1


def test_a_split_that_there_is_not_is_an_error_and_no_row_is_lost(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'validation' \(there is train, valid, test\)"):
        write(tmp_path, [Row({"text": "a"}, split="train"), Row({"text": "b"}, split="validation")])
    with pytest.raises(DataError, match="none of 1 rows is in the train split"):
        write(tmp_path, [Row({"text": "a"}, split="test")])
    assert list(tmp_path.iterdir()) == []


def test_odd_characters_come_back(tmp_path: Path) -> None:
    odd = ["a\u2028b\u2029c\x85d", "\r\n\t\0", "\ufeffx", "é😀", '"\\', "\x1b[2J"]
    write(tmp_path, [Row({"text": text}) for text in odd], test_set_size=0.0)
    assert [content["text"] for _, content in read_rows(tmp_path / "train.jsonl")] == odd


def test_rows_that_could_not_be_read_back_are_skipped_with_the_reason(tmp_path: Path) -> None:
    rows = [Row({"text": "\ud800"}), Row({"text": 5}), Row({"txt": "a"}), *texts(3)]
    made = Rows(rows, skipped=[Skipped("a.module", "it\ud800 hangs")], versions={"mlx": "1"})
    record = write_dataset(made, tmp_path, SplitConfig(), {"builder": "b", "options": {}})
    assert record["skipped"][0] == {"source": "a.module", "reason": "it\ud800 hangs"}
    assert [skipped["source"] for skipped in record["skipped"][1:]] == ["row 1", "row 2", "row 3"]
    assert json.loads((tmp_path / "dataset.json").read_text("utf-8")) == record
    assert record["split"] == {
        "test_set_size": 0.1,
        "split_seed": 0,
        "write_batch_size": 1000,
        "extra_rows": None,
    }
    assert (record["builder"], record["versions"], record["groups"]) == ("b", {"mlx": "1"}, 3)


def test_no_rows_is_an_error_that_tells_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no rows were made \(skipped: mlx: no such package\)"):
        write_dataset(Rows([], skipped=[Skipped("mlx", "no such package")]), tmp_path, SplitConfig(), {})
    with pytest.raises(DataError, match=r"no rows were made \(skipped: none\)"):
        write(tmp_path, [])
