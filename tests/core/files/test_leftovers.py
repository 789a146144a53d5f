from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxlora_core.files import durable
from mlxlora_core.files.leftovers import clear_leftovers, temporary_name

DEAD = 2**22 + 1  # no process has this number


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_dead_processes_left_is_cleared_by_name(tmp_path: Path) -> None:
    alive = os.getppid()
    mine = [temporary_name("step-1", DEAD, "tmp"), temporary_name("step-2", DEAD, "gone")]
    kept = [temporary_name("step-1", alive, "tmp"), temporary_name("other-1", DEAD, "tmp")]
    for name in (*mine, *kept):
        (tmp_path / name).mkdir()
    (tmp_path / temporary_name("step-3", DEAD, "old")).mkdir()
    assert clear_leftovers(tmp_path, "step-*") == 3
    assert names(tmp_path) == sorted([*kept, "step-3"])
    assert clear_leftovers(tmp_path / "nowhere", "*") == 0


@pytest.mark.parametrize(
    "name",
    [
        f".file.{DEAD}.tmp",
        f".file.{DEAD}.old",
        f".file.{DEAD}.gone",
        ".file.1.2.tmp",
        ".file.x.tmp",
        ".file..tmp",
        f".file.{DEAD}-.tmp",
        f".file.{DEAD}-0123456789abcdef.tmp",
        f".file.0{temporary_name('file', DEAD, 'tmp').removeprefix('.file.')}",
        temporary_name("file", DEAD, "txt"),
        ".file.²-x.tmp",
    ],
)
def test_a_file_of_somebody_else_that_is_called_alike_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    durable.write_text(tmp_path / "file", "new")
    assert (tmp_path / name).read_text() == "precious"
    assert names(tmp_path) == sorted([name, "file"])


def test_a_link_that_a_dead_process_left_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    (tmp_path / temporary_name("target", DEAD, "gone")).symlink_to(tmp_path / "elsewhere")
    assert clear_leftovers(tmp_path, "target") == 1
    assert (tmp_path / "elsewhere" / "file").read_text() == "precious"
