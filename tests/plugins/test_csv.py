"""The table of the ``csv`` observer."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
from mlxlora_csv import start
from mlxlora_csv.table import COLUMNS, OLDER

from mlxlora_core.errors import UsageError
from mlxlora_core.series import RunInfo
from mlxlora_core.specs import NoOptions
from mlxlora_core.training.session import report_line


def watch(folder: Path, stem: str = "metrics") -> Any:
    return start(RunInfo(folder, "name", {}, stem), NoOptions())


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1.5, **more}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_a_row_a_report_as_it_comes(tmp_path: Path) -> None:
    watcher = watch(tmp_path, "adapters")
    assert not list(tmp_path.iterdir()), "a run that trains nothing leaves what is there as it is"
    watcher.event({"kind": "training_started", "step": 0, "steps": 10})
    watcher.event(train(5))
    assert rows(tmp_path / "adapters.csv") == [{"step": "5", "kind": "train", "loss": "1.5"}]
    watcher.event({"kind": "valid", "step": 10, "loss": None, "tokens": 7, "seconds": 0.25})
    watcher.end("done")
    assert rows(tmp_path / "adapters.csv")[1] == {
        "step": "10",
        "kind": "valid",
        "tokens": "7",
        "seconds": "0.25",
    }


def test_every_number_of_a_report_has_a_column() -> None:
    from dataclasses import fields

    from mlxlora_core.training import loop

    reports = (loop.TrainReport, loop.ValidReport, loop.SpikeReport)
    assert {"kind", *(field.name for report in reports for field in fields(report))} == set(COLUMNS)
    assert report_line(loop.SpikeReport(1, 2.0, 1.0)).keys() == {"kind", "step", "loss", "median"}


def test_what_is_behind_the_step_that_training_goes_on_from_goes(tmp_path: Path) -> None:
    first = watch(tmp_path)
    first.event({"kind": "training_started", "step": 0})
    for step in (10, 20, 30):
        first.event(train(step))
    table = tmp_path / "metrics.csv"
    with open(table, "a") as file:
        file.write("25,tra")  # what a killed process may leave
    again = watch(tmp_path)
    again.event({"kind": "training_started", "step": 20})
    again.event(train(30))
    assert [row["step"] for row in rows(table)] == ["10", "20", "30"]
    anew = watch(tmp_path)
    anew.event({"kind": "training_started", "step": 0})
    assert rows(table) == []


def test_a_table_of_before_goes_on_with_its_columns(tmp_path: Path) -> None:
    table = tmp_path / "metrics.csv"
    table.write_text(",".join(OLDER) + "\n10,train\n")
    again = watch(tmp_path)
    again.event({"kind": "training_started", "step": 10})
    again.event(train(20, padding=0.5))
    assert [row["step"] for row in rows(table)] == ["10", "20"]
    assert table.read_text().startswith(",".join(OLDER) + "\n") and "0.5" not in table.read_text()


@pytest.mark.parametrize("content", [b"", b"step,loss\n", b"\xff\xfe", b"my notes\n1\n"])
def test_a_file_that_is_none_of_its_tables_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UsageError, match="left alone"):
        watch(tmp_path)
    assert (tmp_path / "metrics.csv").read_bytes() == content


def test_a_pipe_is_left_alone_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.csv")
    with pytest.raises(UsageError, match="pipe"):
        watch(tmp_path)
    assert (tmp_path / "metrics.csv").is_fifo()


def test_text_with_commas_is_one_cell(tmp_path: Path) -> None:
    watcher = watch(tmp_path)
    watcher.event(train(1, median='a,"b"\nc'))
    assert rows(tmp_path / "metrics.csv")[0]["median"] == 'a,"b"\nc'
