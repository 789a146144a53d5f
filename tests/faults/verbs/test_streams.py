"""Standard streams that are full, closed, gone or slow: the work goes on, and exit codes stay.

The suite closes two sets of streams of four, and looks at a part of the verbs under odd clocks;
``MLXLORA_TEST_ALL=1`` takes all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
MLXLORA = [sys.executable, "-m", "mlxlora_core"]


def train(model: Path, rows: Path, folder: Path, *more: str, iters: int = 3) -> list[str]:
    """A training that says something at each step."""
    arguments = ["--model", model, "--data", rows, "--adapter-file", folder / "a.safetensors"]
    return [*MLXLORA, "train", *map(str, arguments), "--iters", str(iters), "--steps-per-report", "1", *more]


def run(command: list[str], **streams: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, timeout=120, **{"stdin": subprocess.DEVNULL, **streams})


# --- stderr -------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_messages_stops_nothing(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    with open("/dev/full", "wb") as full:
        assert run(train(tiny_model, tiny_rows, tmp_path), stderr=full).returncode == 0
        assert (tmp_path / "a.safetensors").is_file()
        failing = [*MLXLORA, "generate", "--model", str(tmp_path / "none"), "-p", "x"]
        assert run(failing, stderr=full).returncode == 4
        assert run([*MLXLORA, "generate", "--nonsense"], stderr=full).returncode == 2


def test_a_log_at_its_size_limit_stops_nothing(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    """The limit holds for all files of the process, so that the log must be large already."""
    log = tmp_path / "log"
    log.write_bytes(b"x" * (8 << 20))
    command = train(tiny_model, tiny_rows, tmp_path)
    size = (8 << 20, 8 << 20)
    with log.open("ab") as file:
        done = run(command, stderr=file, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, size))
    assert done.returncode == 0 and (tmp_path / "a.safetensors").is_file()
    assert log.stat().st_size == 8 << 20


def on_terminal(command: list[str], until: bytes, **options: Any) -> subprocess.Popen[bytes]:
    """A process whose terminal has been closed once it had shown ``until``."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, start_new_session=True, **options
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 60
    while until not in shown:
        assert time.monotonic() < deadline and process.poll() is None, shown
        if select.select([master], [], [], 0.1)[0]:
            shown += os.read(master, 1 << 16)
    os.close(master)
    return process


def test_training_goes_on_when_its_terminal_is_gone(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    process = on_terminal(train(tiny_model, tiny_rows, tmp_path, "--test", iters=60), b"step  5/60")
    assert process.wait(120) == 0
    assert (tmp_path / "a.safetensors").is_file()


def test_a_hang_up_saves_and_ends_as_documented(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    """SIGHUP as a shell sends it, and nobody there to be told."""
    process = on_terminal(train(tiny_model, tiny_rows, tmp_path, iters=100_000), b"step      5/")
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 129
    assert list((tmp_path / "a.checkpoints").glob("step-*/MANIFEST.json"))


def test_a_stderr_that_takes_nothing_and_does_not_block_is_not_waited_for(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, fcntl.fcntl(writer, fcntl.F_GETFL) | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    assert run(train(tiny_model, tiny_rows, tmp_path), stderr=writer).returncode == 0
    os.close(reader)
    os.close(writer)


# --- stdout -------------------------------------------------------------------


def test_a_result_that_cannot_be_written_is_6(tiny_model: Path) -> None:
    generate = [*MLXLORA, "generate", "--model", str(tiny_model), "-p", "A", "-n", "2"]
    with open("/dev/full", "wb") as full:
        done = run(generate, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 6, done.stderr
    last = done.stderr.splitlines()[-1].decode()
    assert last.startswith(f"mlxlora: stdout: cannot be written: {os.strerror(errno.ENOSPC)}. Fix: ")
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.parametrize("verb", ["plugins", "components", "doctor"])
def test_a_stdout_that_is_open_to_read_alone_is_6(verb: str) -> None:
    with open("/dev/null", "rb") as nothing:
        done = run([*MLXLORA, verb], stdout=nothing, stderr=subprocess.PIPE)
    assert done.returncode == 6, done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"mlxlora: stdout: cannot be written: ")


# --- closed ones --------------------------------------------------------------


CLOSED = [(0, 1, 2), (2,), (0,), (1,)]


@pytest.mark.parametrize("closed", CLOSED if ALL else CLOSED[:2], ids=str)
def test_closed_streams_are_no_fault(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path, closed: tuple[int, ...]
) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    done = run(train(tiny_model, tiny_rows, tmp_path, "-p", "A", "--num-tokens", "2"), preexec_fn=close)
    assert done.returncode == 0
    # A file that had taken the number of a stream would hold messages.
    from mlxlora_core.files import tensor_file

    assert tensor_file.load(tmp_path / "a.safetensors")[0]
    assert done.returncode == run([*MLXLORA, "components"], preexec_fn=close).returncode


# --- stdin --------------------------------------------------------------------


#: mlxlora, with less patience for a stdin that is silent
IMPATIENT = "from mlxlora_core.cli import generate, main; generate.SILENCE_SECONDS = 1; main()"


def asked(model: Path, **streams: Any) -> tuple[int, str]:
    """Exit code and last line of stderr of a prompt that is read from stdin."""
    command = [sys.executable, "-c", IMPATIENT, "generate", "--model", str(model), "-p", "-", "-n", "2"]
    done = subprocess.run(command, timeout=120, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **streams)
    return done.returncode, done.stderr.decode().splitlines()[-1]


def test_stdin_that_is_closed_or_cannot_be_read_is_2(tiny_model: Path) -> None:
    assert asked(tiny_model, preexec_fn=lambda: os.close(0)) == (
        2,
        "mlxlora: stdin is closed. Fix: give the prompt after -p",
    )
    with open(os.devnull, "wb") as nothing:
        code, line = asked(tiny_model, stdin=nothing)
    assert code == 2 and line.startswith("mlxlora: stdin cannot be read: Bad file descriptor")


def test_stdin_that_does_not_block_is_waited_for_a_while(tiny_model: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETFL, fcntl.fcntl(reader, fcntl.F_GETFL) | os.O_NONBLOCK)
    command = [*MLXLORA, "generate", "--model", str(tiny_model), "-p", "-", "-n", "2", "--json"]
    with subprocess.Popen(command, stdin=reader, stdout=subprocess.PIPE) as process:
        for part in (b"A ", b"layer"):
            time.sleep(0.5)
            os.write(writer, part)
        os.close(writer)
        assert process.stdout is not None
        assert b'"prompt": "A layer"' in process.stdout.read()
    assert process.returncode == 0
    silent, writer = os.pipe()
    fcntl.fcntl(silent, fcntl.F_SETFL, fcntl.fcntl(silent, fcntl.F_GETFL) | os.O_NONBLOCK)
    code, line = asked(tiny_model, stdin=silent)
    assert code == 2 and line.startswith("mlxlora: stdin cannot be read: Resource temporarily unavailable")
    for number in (reader, silent, writer):
        os.close(number)


# --- clocks -------------------------------------------------------------------

#: a verb while the clock stands still, or goes back
CLOCK = """
import itertools, sys, time
from mlxlora_core import cli
ticks = itertools.count(1000, int(sys.argv.pop(1)))
time.perf_counter = time.monotonic = time.time = lambda: float(next(ticks))
raise SystemExit(cli.execute(sys.argv[1:]))
"""


@pytest.mark.parametrize("tick", ["0", "-7"])
def test_a_clock_that_stands_still_or_goes_back_divides_by_nothing(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path, tick: str
) -> None:
    log = tmp_path / "log.jsonl"
    command = train(
        tiny_model, tiny_rows, tmp_path, "--metrics-file", str(log), "-p", "A", "--num-tokens", "2", "--test"
    )
    done = run([sys.executable, "-c", CLOCK, tick, *command[3:]], stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert '"steps_per_second": null' in log.read_text()
    if tick != "0" and not ALL:
        return
    doctor = run([sys.executable, "-c", CLOCK, tick, "doctor", "--json"], capture_output=True)
    assert doctor.returncode == 0 and b'"gflops": null' in doctor.stdout, doctor.stderr
