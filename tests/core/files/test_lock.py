"""Locks between processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxlora_core.errors import ExitCode, LockedError, ResourceError, SafetyError
from mlxlora_core.files import lock

HOLDS = """
import sys
from pathlib import Path
from mlxlora_core.files import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``target`` until its stdin is closed."""
    command = [sys.executable, "-c", HOLDS, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_the_second_stops_at_once_and_is_told_who_is_the_first(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        with pytest.raises(LockedError) as fault, lock.hold(tmp_path / "run"):
            pass
        assert re.search(
            rf"run: is in use by process {process.pid} on {re.escape(os.uname().nodename)} since 20\d\d-",
            str(fault.value),
        )
        with lock.hold(tmp_path / "other"):
            pass
    assert fault.value.exit_code == ExitCode.LOCKED == 9
    with lock.hold(tmp_path / "run"):
        pass


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with lock.hold(tmp_path / "new" / "run"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".run.lock"]
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path / "run"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".run.lock").is_file()
    with lock.hold(tmp_path / "run"):
        told = json.loads((tmp_path / ".run.lock").read_text())
        assert told["process"] == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_a_dead_process_that_lives_again_says_nothing(tmp_path: Path) -> None:
    told = {"process": str(os.getpid()), "host": os.uname().nodename, "boot": "", "since": "yesterday"}
    (tmp_path / ".run.lock").write_text(json.dumps(told))
    with lock.hold(tmp_path / "run"):
        pass


def test_a_lock_that_another_machine_left_is_not_taken(tmp_path: Path) -> None:
    told = {"process": "17", "host": "elsewhere", "boot": "another", "since": "2026-01-01T00:00:00+00:00"}
    left = tmp_path / ".run.lock"
    left.write_text(json.dumps(told))
    for _ in range(2):
        with pytest.raises(LockedError, match=r"process 17 on elsewhere since .* remove .*\.run\.lock"):
            lock.hold(tmp_path / "run").__enter__()
    left.unlink()
    with lock.hold(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b'{"proc', b"\0" * 40, b'{"process": "1", "ho'),
        *(b'{"process": "1", "x": ' + b"[" * 4000, b'{"process": "1", "host": 5}', b'{"process": "\xff"}'),
    ],
)
def test_a_lock_file_that_tells_nothing_is_free(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".run.lock").write_bytes(content)
    with lock.hold(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "content", [b"[1]", b"\xff", b'"x"', b"null", b"{}", b'{"name": "app", "lockfileVersion": 3}', b" "]
)
def test_a_file_of_somebody_else_that_is_called_like_a_lock_is_left_alone(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / ".run.lock").write_bytes(content)
    with pytest.raises(SafetyError, match="left alone"), lock.hold(tmp_path / "run"):
        pass
    assert (tmp_path / ".run.lock").read_bytes() == content


def test_two_names_of_one_folder_have_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    with lock.hold(tmp_path / "link"), pytest.raises(LockedError), lock.hold(Path(".")):
        pass


def test_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be locked"), lock.hold(tmp_path / "file" / "run"):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ResourceError), lock.hold(tmp_path / "run"):
        pass
    assert not (tmp_path / "victim").exists()


def test_a_file_system_without_locks_is_told(tmp_path: Path) -> None:
    """strace makes flock(2) say what a network drive without locks says."""
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=flock:error=ENOLCK"]
    command += [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=60)
    assert "cannot be locked against a second run" in done.stderr
    assert "name a place on a local disk" in done.stderr


def test_of_many_that_come_at_once_one_at_a_time_is_in(tmp_path: Path) -> None:
    """Each adds 1 to a number that it reads and writes without care; none is lost."""
    program = """
import sys, time
from pathlib import Path
from mlxlora_core.files import lock
from mlxlora_core.errors import LockedError
folder, done = Path(sys.argv[1]), 0
while done < 50:
    try:
        with lock.hold(folder / "run"):
            number = int((folder / "number").read_text())
            time.sleep(0.0005)
            (folder / "number").write_text(str(number + 1))
            done += 1
    except LockedError:
        time.sleep(0.0005)
"""
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "150"
