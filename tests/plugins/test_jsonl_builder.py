"""Dataset builder ``jsonl``: which files are read, and which split their rows have."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from mlxlora_jsonl import JsonlOptions, build, inputs

from mlxlora_core.errors import DataError, UsageError
from mlxlora_core.options import parse
from mlxlora_core.values import Rows


def write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def options(**values: Any) -> JsonlOptions:
    return parse(JsonlOptions, values, owner="builder 'jsonl'")


def rows(**values: Any) -> list[tuple[str, str | None]]:
    return [(row.content["text"], row.split) for row in build(options(**values)).rows]


def skipped(made: Rows) -> dict[str, str]:
    return {Path(skip.source).name: skip.reason for skip in made.skipped}


def test_a_file_is_left_for_mlxlora_to_split(tmp_path: Path) -> None:
    assert rows(path=write(tmp_path / "train.jsonl", "a", "b")) == [("a", None), ("b", None)]
    assert rows(path=write(tmp_path / "rows.txt", "a")) == [("a", None)]


def test_a_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    for name in ("valid", "train", "test", "more"):
        write(tmp_path / f"{name}.jsonl", f"{name} row")
    assert rows(path=tmp_path) == [("test row", "test"), ("train row", "train"), ("valid row", "valid")]
    reason = skipped(build(options(path=tmp_path)))["more.jsonl"]
    assert "only those are read" in reason


def test_of_any_other_folder_all_files_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "3")
    write(tmp_path / "a.jsonl", "2", "1")
    write(tmp_path / "notes.txt", "no rows")
    assert rows(path=tmp_path) == [("2", None), ("1", None), ("3", None)]


def test_files_come_after_path_and_each_once(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", "a"), write(tmp_path / "b.jsonl", "b")
    assert rows(path=str(b), files=[str(a), str(b), str(a)]) == [("b", None), ("a", None)]
    assert rows(files=f"{a},{b}") == [("a", None), ("b", None)]


def test_rows_of_all_shapes_come_through(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [
        {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"text": ""},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, given)))
    assert [row.content for row in build(options(path=path)).rows] == given


def test_blank_lines_and_files_without_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n')
    (tmp_path / "b.jsonl").touch()
    made = build(options(path=tmp_path))
    assert len(made.rows) == 1
    assert skipped(made) == {"a.jsonl": "2 blank lines", "b.jsonl": "there is no row in it"}


def test_bad_lines_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n')
    (tmp_path / "test.jsonl").write_text('\n{"text": 1}\n')
    with pytest.raises(DataError) as caught:
        build(options(path=tmp_path))
    text = str(caught.value)
    assert text.startswith("2 bad lines: ")
    assert f"{tmp_path}/train.jsonl:2: needs text" in text
    assert f"{tmp_path}/test.jsonl:2: text is a number" in text


def test_files_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    good = write(tmp_path / "good.jsonl", "a")
    with pytest.raises(DataError) as caught:
        build(options(files=[tmp_path / "missing.jsonl", good, tmp_path / "pipe.jsonl"]))
    text = str(caught.value)
    assert f"{tmp_path}/missing.jsonl: there is no such file" in text
    assert f"{tmp_path}/pipe.jsonl: is a pipe or a device" in text


def test_one_bad_file_keeps_its_place_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16") as caught:
        build(options(path=path))
    assert (caught.value.where, caught.value.fix) == (str(path), "iconv -f UTF-16 -t UTF-8")


@pytest.mark.parametrize("names", [(), ("rows.json",)])
def test_a_folder_without_rows_is_an_error(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / name, "a")
    with pytest.raises(DataError, match=r"there is no \.jsonl file in this folder"):
        build(options(path=tmp_path))


def test_something_to_read_is_required() -> None:
    with pytest.raises(UsageError, match="path or files is required"):
        options()


def test_inputs_are_the_files_that_are_read(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", "a")
    write(tmp_path / "other.jsonl", "b")
    told = inputs(options(path=tmp_path))
    assert list(told) == [str(train)]
    assert told[str(train)] == hashlib.sha256(train.read_bytes()).hexdigest()
    state = train.stat()
    train.write_bytes(train.read_bytes().replace(b"a", b"c"))
    os.utime(train, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert inputs(options(path=tmp_path)) != told, "size and time are the same, and the rows are not"
    train.write_bytes(train.read_bytes().replace(b"c", b"a"))
    assert inputs(options(path=tmp_path)) == told, "the rows are what they were, whenever they were written"
    with pytest.raises(DataError, match="missing"):
        inputs(options(path=tmp_path / "missing"))
