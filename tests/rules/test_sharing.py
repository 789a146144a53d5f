"""The suite is shared out between processes by file, and what needs a quiet machine is not divided."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharing

TESTS = Path(__file__).parents[1]
NOTES = """
import os, pathlib, pytest
@pytest.mark.parametrize("number", range(9))
def test_it(number):
    with open(os.environ["NOTE"], "a") as note:
        note.write(f"{pathlib.Path(__file__).name} {os.environ.get('PYTEST_XDIST_WORKER')}\\n")
"""


def test_every_file_that_needs_a_quiet_machine_is_there() -> None:
    for name in sharing.QUIET:
        assert (TESTS / name).is_file(), name
        assert sharing.is_quiet(f"tests/{name}::test_it[a::b]")
    assert not sharing.is_quiet("tests/rules/test_sharing.py::test_it")


def ran(folder: Path, *arguments: str) -> tuple[list[str], dict[str, set[str]]]:
    """The files of a suite of its own in the order of their tests, and the processes that each was in."""
    for name in ("a/test_a.py", "a/test_b.py", "a/test_c.py", *sharing.QUIET[-3:]):
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NOTES)
    (folder / "tests" / "conftest.py").write_text("from sharing import *\n")
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (folder / "note").unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables = {**kept, "PYTHONPATH": str(TESTS), "NOTE": str(folder / "note")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in (folder / "note").read_text().splitlines()]
    assert len(lines) == (3 if "tests/a" in arguments else 6) * 9
    files = [name for name, _ in lines]
    return files, {name: {process for file, process in lines if file == name} for name in files}


@pytest.mark.parametrize("arguments", [["-n", "2"], ["tests"]])
def test_files_stay_whole_and_quiet_ones_are_with_one_process(tmp_path: Path, arguments: list[str]) -> None:
    pytest.importorskip("xdist")
    if arguments == ["tests"] and sharing.processors() == 1:
        pytest.skip("there is one processor: nothing to share out to")
    _, processes = ran(tmp_path, *arguments)
    assert all(len(found) == 1 for found in processes.values())
    quiet = set.union(*(processes[Path(name).name] for name in sharing.QUIET[-3:]))
    assert len(quiet) == 1
    assert set.union(*processes.values()) == {"gw0", "gw1"}


@pytest.mark.parametrize("arguments", [["-n", "0"], ["-p", "no:xdist"], ["--pdb"], ["tests/a"]])
def test_a_part_and_a_search_for_a_fault_run_in_one_process(tmp_path: Path, arguments: list[str]) -> None:
    pytest.importorskip("xdist")
    files, processes = ran(tmp_path, *arguments)
    assert set.union(*processes.values()) == {"None"}
    if "tests/a" not in arguments:
        assert set(files[: 3 * 9]) == {Path(name).name for name in sharing.QUIET[-3:]}
