"""Whatever a dataset builder gives is rows that can be read back, a line that tells it, or exit code 8."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from mlxlora_core.errors import MlxloraError, PluginError
from mlxlora_core.files.data_path import SPLITS
from mlxlora_core.files.rows import scan_rows
from mlxlora_core.options import NoOptions
from mlxlora_core.plugins import Choice, Component, Plugin
from mlxlora_core.plugins.sections import SplitConfig
from mlxlora_core.specs import DatasetBuilder
from mlxlora_core.training.dataset import build_dataset
from mlxlora_core.values import Row, Rows, Skipped

SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
OTHERS = ({"text": "one"}, {"text": "two"})


def made(folder: Path, rows: Any) -> dict[str, Any]:
    """The record of a dataset of what a builder gives."""
    spec = DatasetBuilder(
        name="odd", summary="odd rows", build=lambda options: rows, inputs=lambda options: {}
    )
    component = Component("builder", spec, Plugin("odd", "odd", "1", "file", "odd.py"))
    return build_dataset(Choice(component, NoOptions()), SplitConfig(), folder / "data")


def read_back(folder: Path) -> list[Any]:
    """All rows of the dataset, none of which may be a fault."""
    found = [scan_rows(folder / "data" / f"{split}.jsonl") for split in SPLITS]
    assert not any(each.faults for each in found)
    return [row for each in found for _, row in each.rows]


def called(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [SAID[0], {"role": "assistant", "content": "a", "tool_calls": [call]}]}


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def round_itself() -> list[Any]:
    tools: list[Any] = []
    tools.append({"a": tools})
    return tools


@pytest.mark.parametrize(
    "extra",
    [
        {"id": datetime.date(2026, 1, 1)},
        {"score": math.nan},
        {"note": "\ud800"},
        {"\ud800": "x"},
        {1: "x"},
        {"x": nested(5000)},
        {"more": "x" * (17 << 20)},
        {"set": {1, 2}},
    ],
    ids=lambda extra: ascii(next(iter(extra))),
)
def test_what_a_row_holds_beside_its_shape_is_told_and_not_written(
    tmp_path: Path, extra: dict[Any, Any]
) -> None:
    record = made(tmp_path, Rows([Row(row | extra) for row in OTHERS]))
    assert sorted(row["text"] for row in read_back(tmp_path)) == ["one", "two"]
    (told,) = record["skipped"]
    assert told["reason"].startswith("keys that are not read: ") and "(2 rows)" in told["reason"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"text": b"a"}, "text is an object, wanted a string"),
        ({"text": "x" * (17 << 20)}, "is longer than 16 MiB"),
        ({"messages": SAID, "tools": [{"a": math.nan}]}, "tools holds what is no JSON"),
        ({"messages": SAID, "tools": round_itself()}, "tools holds what is no JSON: Circular"),
        (called({"day": datetime.date(2026, 1, 1)}), "tool_calls of message 2 holds what is no JSON"),
        (called(nested(5000)), "tool_calls of message 2 is nested too deeply"),
        (called(nested(100)), "tool_calls of message 2 is no usable JSON: more than 64"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_row_that_nobody_could_read_back_is_left_out_and_told(
    tmp_path: Path, content: Any, reason: str
) -> None:
    record = made(tmp_path, Rows([Row(content), *map(Row, OTHERS)]))
    assert sorted(row["text"] for row in read_back(tmp_path)) == ["one", "two"]
    (told,) = record["skipped"]
    assert told["source"] == "row 1" and told["reason"].startswith(reason)


def test_rows_of_the_shapes_that_people_have_are_written_as_plain_ones(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    given = [
        MappingProxyType({"text": "a"}),
        {"conversations": talk},
        {"instruction": "i", "output": "o"},
        called({1: ("a", None)}),
    ]
    made(tmp_path, Rows([Row(content) for content in given]))
    rows = {json.dumps(sorted(row)): row for row in read_back(tmp_path)}
    assert {"text": "a"} in rows.values()
    assert any(row.get("completion") == "o" for row in rows.values())
    said = [row["messages"] for row in read_back(tmp_path) if "messages" in row]
    assert SAID in said
    (call,) = [m["tool_calls"][0] for messages in said for m in messages if "tool_calls" in m]
    assert call["function"]["arguments"] == {"1": ["a", None]}


def test_rows_may_come_one_by_one(tmp_path: Path) -> None:
    made(tmp_path, Rows(Row({"text": str(i)}) for i in range(30)))  # type: ignore[arg-type]
    assert len(read_back(tmp_path)) == 30


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (None, "build gives NoneType, wanted Rows"),
        (Rows(None), "build gives NoneType, wanted lists of rows"),  # type: ignore[arg-type]
        (Rows([{"text": "a"}]), "build gives dict, wanted Row"),  # type: ignore[list-item]
        (Rows([Row([1])]), "build gives list, wanted rows whose content is an object"),  # type: ignore[arg-type]
        (Rows([Row({"text": "a"}, group=None)]), "wanted rows whose group is a text"),  # type: ignore[arg-type]
        (Rows([Row({"text": "a"}, split=5)]), "wanted rows whose split is a text"),  # type: ignore[arg-type]
        (Rows([Row({"text": "a"})], ["a"]), "build gives str, wanted Skipped"),  # type: ignore[list-item]
        (Rows([Row({"text": "a"})], [Skipped("a", 5)]), "wanted texts that tell"),  # type: ignore[arg-type]
        (Rows([Row({"text": "a"})], versions={"a": 5}), "wanted versions that are"),  # type: ignore[dict-item]
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_is_no_rows_is_8_and_names_the_builder(tmp_path: Path, rows: Any, told: str) -> None:
    with pytest.raises(PluginError) as caught:
        made(tmp_path, rows)
    assert isinstance(caught.value, MlxloraError) and caught.value.exit_code == 8
    assert "builder odd:odd" in str(caught.value) and told in str(caught.value)
    assert not (tmp_path / "data").exists()
