"""A run folder takes for done what its record soundly says, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DataError
from mlxlora_core.runs.folder import RunFolder

FACTS = {
    "mlxlora": "0.1.0",
    "recipe": "demo",
    "seed": 0,
    "plugins": {},
    "runtime": [],
    "machine": {},
    "origins": {},
    "inputs": {"model": "m", "data": "d"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run folder in which the stage ``model`` is done."""
    folder = RunFolder(tmp_path / "run")
    folder.begin(FACTS, {})
    (folder.path / "file").write_text("x")
    folder.start("model", "m")
    folder.keep("model", "m", ["file"], {"folder": "somewhere", "ratio": float("inf")})
    return folder.path


def changed(path: Path, place: tuple[str, ...], value: object) -> RunFolder:
    """The folder with another value in its record."""
    record: Any = json.loads((path / "run.json").read_text())
    part = record
    for key in place[:-1]:
        part = part[key]
    if value is None:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    (path / "run.json").write_text(json.dumps(record))
    return RunFolder(path)


def test_what_was_written_is_read(path: Path) -> None:
    folder = RunFolder(path)
    assert folder.faults == [] and folder.holds("model", "m") and not folder.holds("model", "other")
    assert folder.result("model") == {"folder": "somewhere", "ratio": None, "ratio_is": "infinite"}
    assert not folder.holds("data", "d")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("stages",), 5),
        (("stages",), []),
        (("stages",), None),
        (("stages", "model"), 5),
        (("stages", "model", "files"), 5),
        (("stages", "model", "files"), None),
        (("stages", "model", "files"), {"a\0b": [1]}),
        (("stages", "model", "files"), {"file": "x"}),
        (("stages", "model", "files"), {"file": [1, 2, 3]}),
        (("stages", "model", "files"), {"file": [1, 2.0]}),
        (("stages", "model", "files", "file"), [True, 1]),
        (("stages", "model", "result"), 5),
        (("stages", "model", "result"), None),
        (("stages", "model", "inputs"), ["m"]),
        (("stages", "model", "inputs"), None),
    ],
)
def test_what_is_not_sound_is_not_done(path: Path, place: tuple[str, ...], value: object) -> None:
    folder = changed(path, place, value)
    assert not folder.holds("model", "m") and folder.faults and "stages" in folder.faults[0]
    folder.begin(FACTS, {})
    folder.start("model", "m")
    folder.keep("model", "m", ["file"], {"folder": "again"})
    assert RunFolder(path).holds("model", "m") and RunFolder(path).faults == []


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, "../../file", ""])
def test_a_name_that_no_file_has_undoes_a_stage(path: Path, name: str) -> None:
    assert not changed(path, ("stages", "model", "files", name), [1, 2]).holds("model", "m")


@pytest.mark.parametrize("content", ["[1]", '"abc"', '[["a", 1]]', "{}", "null", '{"mlxlora": 5}', "{"])
def test_what_is_no_record_is_refused(path: Path, content: str) -> None:
    (path / "run.json").write_text(content)
    with pytest.raises(DataError, match=r"run.json.*Fix: move the folder away"):
        RunFolder(path)


def test_a_started_that_is_odd_is_made_again(path: Path) -> None:
    folder = changed(path, ("started",), [])
    folder.begin(FACTS, {})
    folder.start("data", "d")
    assert RunFolder(path).record["started"] == {"data": "d"}
