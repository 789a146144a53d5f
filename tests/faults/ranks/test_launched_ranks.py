"""``-n`` and ``--hosts``: what who starts ranks does with signals, failures and other machines."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_models
from bench import write_rows
from rank_trials import PLUGIN, Ranks, train, variables

from mlxlora_core.errors import ExitCode

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")

#: in the place of ssh: another shell in another folder, with none of our variables
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
[ "$1" = unreachable ] && { echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255; }
shift
cd /
exec env -i PATH=/usr/bin:/bin HOME="$HOME" MLXLORA_PLUGINS= sh -c "$*"
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and rows, and an ``ssh`` that leads back to this machine."""
    folder = tmp_path_factory.mktemp("parts")
    small_models.write(folder / "model", "llama")
    write_rows(folder / "data")
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(SSH)
    ssh.chmod(stat.S_IRWXU)
    return folder


@contextmanager
def launcher(parts: Path, folder: Path, *more: object, phase: str = "none") -> Iterator[Ranks]:
    """A training that starts its ranks itself; the process is that of the launcher."""
    folder.mkdir()
    (folder / "plugin.py").write_text(PLUGIN)
    command = train(parts / "model", parts / "data", folder, "-P", folder / "plugin.py", *more)
    environ = variables(folder, phase)
    with open(folder / "err-0", "wb") as err, open(folder / "out", "wb") as out:
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=err)
    try:
        yield Ranks(folder, [process])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def are_gone(ranks: Ranks, count: int) -> bool:
    """Whether none of the ranks is left, within a while."""
    deadline = time.monotonic() + 30
    pids = [int((ranks.folder / f"pid-{rank}").read_text()) for rank in range(count)]
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_a_signal_ends_all_at_one_step_and_saves_it(parts: Path, tmp_path: Path) -> None:
    with launcher(parts, tmp_path / "run", "-n", 2, phase="step") as ranks:
        ranks.wait_for("reached")
        ranks.processes[0].send_signal(signal.SIGINT)
        time.sleep(0.5)  # it has passed it on
        (ranks.folder / "go").touch()
        assert ranks.processes[0].wait(60) == 128 + signal.SIGINT
        (said,) = ranks.said()
        assert "is saved. Go on with: mlxlora train" in said and " -n 2" in said
        assert are_gone(ranks, 2)
        checkpoints = sorted(path.name for path in ranks.folder.glob("a.checkpoints/step-*"))
    done = subprocess.run(
        train(parts / "model", parts / "data", ranks.folder, "-n", 2, "--resume"),
        env=variables(ranks.folder),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {int(checkpoints[-1].partition('-')[2])} of" in done.stderr


#: holds rank 1 up after the ranks have met, while MLX holds rank 0 as it joins them, which hears of no signal
#: then, as where it comes a moment before MLX waits
JOINS_LATE = """
import os, signal, time
from pathlib import Path
from mlxlora_core.api import hookimpl
from mlxlora_core.distributed import starting

@hookimpl
def mlxlora_observers():
    return []

def wait():
    (Path(os.environ["TRIAL"]) / "reached").touch()
    time.sleep(60)

if os.environ["MLX_RANK"] == "1":
    starting._ended_by_signal = wait
else:
    signal.siginterrupt(signal.SIGINT, False)
"""


def test_a_signal_while_ranks_join_ends_them(parts: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.py"
    late.write_text(JOINS_LATE)
    with launcher(parts, tmp_path / "run", "-n", 2, "-P", late) as ranks:
        ranks.wait_for("reached")
        time.sleep(1)  # rank 0 joins
        ranks.processes[0].send_signal(signal.SIGINT)
        assert ranks.processes[0].wait(15) == 128 + signal.SIGINT
        assert ranks.said() == ["mlxlora: interrupted"]
        assert are_gone(ranks, 2)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("seconds", [0, 0.05, 0.1, 0.2, 0.4, 0.8] if ALL else [0, 0.1])
def test_a_signal_while_ranks_begin_ends_them(parts: Path, tmp_path: Path, seconds: float) -> None:
    with launcher(parts, tmp_path / "run", "-n", 2) as ranks:
        (process,) = ranks.processes
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        assert (ranks.folder / "err-0").read_text() == "mlxlora: interrupted\n"


@pytest.mark.parametrize("lost", [0, 1] if ALL else [0])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP] if ALL else [signal.SIGKILL])
def test_a_rank_that_is_killed_or_stopped_is_one_line(
    parts: Path, tmp_path: Path, signum: signal.Signals, lost: int
) -> None:
    with launcher(parts, tmp_path / "run", "-n", 2, phase="step") as ranks:
        ranks.wait_for("reached")
        os.kill(int((ranks.folder / f"pid-{lost}").read_text()), signum)
        (ranks.folder / "go").touch()
        assert ranks.processes[0].wait(30) == ExitCode.RANK
        (said,) = ranks.said()
        assert said.startswith(f"mlxlora: rank {lost} on ")
        assert are_gone(ranks, 2)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_ranks_end_in_good_order_when_their_launcher_is_killed(parts: Path, tmp_path: Path) -> None:
    with launcher(parts, tmp_path / "run", "-n", 2, phase="step") as ranks:
        ranks.wait_for("reached")
        ranks.processes[0].kill()
        time.sleep(2.5)  # so that they notice
        (ranks.folder / "go").touch()
        assert are_gone(ranks, 2)
        assert any("is saved. Go on with" in line for line in ranks.said())


def test_what_one_rank_cannot_do_is_told_once(parts: Path, tmp_path: Path) -> None:
    with launcher(parts, tmp_path / "run", "-n", 3, "--batch-size", 0) as ranks:
        assert ranks.processes[0].wait(60) == ExitCode.USAGE
        (said,) = ranks.said()
        assert "batch-size" in said


# --- other machines -----------------------------------------------------------


def on_hosts(parts: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that trains with another machine of this name."""
    monkeypatch.setenv("PATH", f"{parts / 'bin'}:{os.environ['PATH']}")
    here, other = ({"ssh": ssh, "ips": ["127.0.0.1"]} for ssh in ("localhost", name))
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps({"hosts": [here, other], "envs": ['MLXLORA_SAID=it\'s "$HOME"']}))
    return train(parts / "model", parts / "data", folder, "--hosts", hosts, "-p", "it's $1")


def test_a_rank_on_another_machine(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = on_hosts(parts, tmp_path, "far-away", monkeypatch)
    done = subprocess.run(
        command, env=variables(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.safetensors").exists()


@pytest.mark.skipif(not ALL, reason="waits for the time of the start; MLXLORA_TEST_ALL=1")
def test_a_machine_that_cannot_be_reached(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = on_hosts(parts, tmp_path, "unreachable", monkeypatch)
    done = subprocess.run(command, env=variables(tmp_path), capture_output=True, text=True, timeout=120)
    assert done.returncode == ExitCode.RANK
    assert "mlxlora: rank 1 of 2 did not come within 20 s of the start" in done.stderr
    assert "mlxlora: rank 1 on unreachable: ssh: connect to host unreachable" in done.stderr


def test_no_ssh_is_one_line(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = on_hosts(parts, tmp_path, "far-away", monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = subprocess.run(command, env=variables(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith("mlxlora: ssh cannot start rank 1 on far-away: No such file or directory")
    assert done.stderr.count("\n") == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["hosts.json"]


def test_no_working_folder_is_one_line(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = on_hosts(parts, tmp_path, "far-away", monkeypatch)
    (tmp_path / "gone").mkdir()
    leave = ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path / "gone"), *command]
    done = subprocess.run(leave, env=variables(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith("mlxlora: the working folder is gone") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("-n", "2", "--hosts", "x.json"), "give one of them"),
        (("--hosts", "no-such.json"), "no-such.json"),
        (("-n", "0"), "-n"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    command = [sys.executable, "-m", "mlxlora_core", "train", *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == ExitCode.USAGE
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_more_ranks_than_a_machine_can_use_are_not_started(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": "localhost", "ips": ["127.0.0.1"]}] * 9999))
    for more in (("-n", "9999"), ("--hosts", str(hosts))):
        command = [sys.executable, "-m", "mlxlora_core", "train", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (
            done.returncode == ExitCode.USAGE and "asks for 9999 processes; this machine can" in done.stderr
        )


def test_a_rank_does_not_start_other_ranks(tmp_path: Path) -> None:
    environ = {**os.environ, "MLX_RANK": "0", "MLX_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "mlxlora_core", "train", "-n", "3"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == ExitCode.USAGE
    assert "this process is one of 2 ranks, and the options ask for 3" in done.stderr
