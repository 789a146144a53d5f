"""What goes wrong while a training saves or goes on: full disks, limits, failing calls, signals, plugins."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from bench import Bench
from forkserver import PLACES

from mlxlora_core.training.checkpoints import find

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs user namespaces and strace")
ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
STEPS = ["--iters", "12", "--save-every", "4"]
OFTEN = ["--steps-per-eval", "6"]
ENVIRONMENT = {**os.environ, "MLXLORA_PLUGINS": "", "MLXLORA_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Path:
    """Where the training of twelve steps was not disturbed."""
    folder = bench.folder / "whole-saving"
    folder.mkdir()
    bench.run(*bench.train(folder, *STEPS))
    return folder


@pytest.fixture(scope="module")
def validated(bench: Bench) -> Path:
    """The same, validated every six steps: what an adapter file says of its training tells of validations."""
    folder = bench.folder / "whole-validated"
    folder.mkdir()
    bench.run(*bench.train(folder, *STEPS, *OFTEN))
    return folder


def results(folder: Path) -> list[bytes]:
    last = folder / "a.checkpoints" / "step-0000012"
    files = (folder / "a.safetensors", last / "adapter.safetensors", last / "optimizer.safetensors")
    return [file.read_bytes() for file in files]


def valid(folder: Path) -> list[int]:
    """Steps of the checkpoints that verify, newest first."""
    return [checkpoint.step for checkpoint in find(folder / "a.checkpoints").valid]


def go_on(bench: Bench, folder: Path, whole: Path) -> None:
    """Go on, or begin where nothing was saved; the end must be that of the whole."""
    more = ["--resume"] if valid(folder) else []
    bench.run(*bench.train(folder, *STEPS, *more))
    assert results(folder) == results(whole)
    assert sorted(path.name for path in folder.rglob(".*")) == []


def command(bench: Bench, folder: Path, *more: object) -> list[str]:
    return [sys.executable, "-m", "mlxlora_core", *map(str, bench.train(folder, *STEPS, *more))]


def one_line(text: str) -> str:
    """The error, which is the last line; a traceback fails the test."""
    assert "Traceback" not in text, text
    last = text.splitlines()[-1]
    assert last.startswith("mlxlora: "), text
    return last


# --- the disk -----------------------------------------------------------------

# Fills a small disk of its own but for so many bytes, and trains there; what is on it is copied out.
FULL = """
mount -t tmpfs -o size=1m none {disk} && cp -r {before}/. {disk}
head -c $(( $(df --output=avail -B1 {disk} | tail -1) - {room} )) /dev/zero > {disk}/ballast
{command}
code=$?
rm {disk}/ballast
cp -r {disk}/. {after}
exit $code
"""


@LINUX
@pytest.mark.parametrize("saves", [0, 1, 2])
def test_a_full_disk_at_any_save_leaves_what_was_saved_and_goes_on_when_there_is_room(
    bench: Bench, tmp_path: Path, whole: Path, saves: int
) -> None:
    before, after, disk = (tmp_path / name for name in ("before", "after", "disk"))
    for folder in (before, after, disk):
        folder.mkdir()
    if saves:
        for step in range(4, 4 * saves + 1, 4):
            # As it was when that step had been saved.
            name = f"step-{step:07}"
            source = whole if (whole / "a.checkpoints" / name).is_dir() else early(bench)
            shutil.copytree(source / "a.checkpoints" / name, before / "a.checkpoints" / name)
    more = ["--resume"] if saves else []
    script = FULL.format(
        disk=disk, before=before, after=after, room=6000, command=" ".join(command(bench, disk, *more))
    )
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == 6, done.stderr
    assert "No space left on device" in one_line(done.stderr)
    assert valid(after) == list(range(4 * saves, 0, -4))
    go_on(bench, after, whole)


def early(bench: Bench) -> Path:
    """A training of which every checkpoint was kept."""
    folder = bench.folder / "early-saving"
    if not folder.exists():
        folder.mkdir()
        bench.run(*bench.train(folder, *STEPS, "--keep", "9"))
    return folder


def test_a_limit_on_the_size_of_files_is_told_with_the_file(
    bench: Bench, tmp_path: Path, whole: Path
) -> None:
    sizes = {
        path.name: path.stat().st_size for path in (early(bench) / "a.checkpoints/step-0000004").iterdir()
    }
    for limit in (sizes["adapter.safetensors"] - 1, sizes["optimizer.safetensors"] - 1):
        folder = tmp_path / str(limit)
        folder.mkdir()
        ended = bench.server.run(bench.train(folder, *STEPS), limits={"RLIMIT_FSIZE": limit})
        assert ended.code == 6, ended.err
        assert "File too large" in one_line(ended.err)
        assert valid(folder) == []
        go_on(bench, folder, whole)


# Each file is flushed, then its folder, which need not succeed; a checkpoint of four files twice more.
FILES = [*range(1, 11, 2), *(11 + 10 * save + file for save in range(3) for file in (0, 2, 4, 6)), 41]
# Of the optimizer in the first checkpoint. Before come the record of the training and its log, five files.
INJECTED = [("fsync", "EIO", 13), ("rename", "EXDEV", 7)]
if ALL:
    INJECTED += [("fsync", "EIO", when) for when in FILES]
    INJECTED += [("rename", error, when) for error in ("ENOSPC", "EACCES") for when in range(1, 22)]


@LINUX
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize(("call", "error", "when"), INJECTED, ids=lambda value: str(value))
def test_a_call_that_fails_is_not_tried_again_and_what_it_was_for_does_not_count(
    bench: Bench, tmp_path: Path, whole: Path, call: str, error: str, when: int
) -> None:
    calls = {"fsync": "fsync", "rename": "rename,renameat,renameat2"}[call]
    strace = ["strace", "-f", "-qq", "-y", "-o", str(tmp_path / "trace"), "-e", f"trace={calls}"]
    strace += ["-e", f"inject={calls}:error={error}:when={when}"]
    folder = tmp_path / "run"
    folder.mkdir()
    done = subprocess.run(
        [*strace, *command(bench, folder)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == 6, done.stderr
    assert os.strerror(getattr(__import__("errno"), error)) in one_line(done.stderr)
    trace = (tmp_path / "trace").read_text().splitlines()
    (failed,) = [i for i, line in enumerate(trace) if "INJECTED" in line]
    if call == "fsync":
        path = trace[failed].partition("<")[2].partition(">")[0]
        assert path, trace[failed]
        flushed = [line for line in trace[failed + 1 :] if "fsync(" in line]
        # What is written yet is the report of what there is.
        assert not [line for line in flushed if path in line or "/.step-" in line], "no second try"
    go_on(bench, folder, whole)


@LINUX
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("when", range(1, 18) if ALL else [7])
def test_a_kill_at_a_rename_from_outside_loses_nothing(
    bench: Bench, tmp_path: Path, whole: Path, when: int
) -> None:
    """As the kills at each operation, without any cooperation of the process."""
    calls = "rename,renameat,renameat2"
    strace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}"]
    strace += ["-e", f"inject={calls}:signal=SIGKILL:when={when}"]
    folder = tmp_path / "run"
    folder.mkdir()
    done = subprocess.run(
        [*strace, *command(bench, folder)], capture_output=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode in (-9, 137)
    go_on(bench, folder, whole)


# --- signals ------------------------------------------------------------------


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WHERE = (*PLACES, "mid save")
SIGNALLED = list(itertools.product(WHERE, SIGNALS) if ALL else zip(WHERE, SIGNALS, strict=True))


@pytest.mark.parametrize(("place", "signum"), SIGNALLED, ids=lambda value: getattr(value, "name", value))
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    bench: Bench, tmp_path: Path, validated: Path, place: str, signum: signal.Signals
) -> None:
    arguments = bench.train(tmp_path, *STEPS, *OFTEN)
    if place == "mid save":
        ended = bench.server.run(arguments, signals=[signum], kill=80)
    else:
        ended = bench.server.run(arguments, signals=[signum], place=place)
    assert ended.code == 128 + signum, ended.err
    step, again = (
        one_line(ended.err).removeprefix("mlxlora: interrupted; step ").split(" is saved. Go on with: ")
    )
    assert again.endswith(" --resume")
    assert valid(tmp_path)[0] == int(step) == {"mid step": 7, "mid validation": 6}.get(place, int(step))
    bench.run(*arguments, "--resume")
    assert results(tmp_path) == results(validated)


def test_a_second_signal_in_the_closing_save_ends_at_once_and_what_was_saved_is_intact(
    bench: Bench, tmp_path: Path, whole: Path
) -> None:
    for kill in (120, 140):  # in the second save, which the first signal makes the closing one
        folder = tmp_path / str(kill)
        folder.mkdir()
        ended = bench.server.run(
            bench.train(folder, *STEPS), signals=[signal.SIGINT, signal.SIGTERM], kill=kill
        )
        assert ended.code == -signal.SIGTERM
        assert list(folder.glob("a.checkpoints/.step-0000008.*")), "it was not in that save"
        assert valid(folder) == [4]
        go_on(bench, folder, whole)


@pytest.fixture
def running() -> Iterator[Callable[[str, Sequence[str]], subprocess.Popen[str]]]:
    """A function that starts a command line and waits until it has shown a line."""
    started: list[subprocess.Popen[str]] = []

    def start(until: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        started.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if until in line:
                return process
        raise AssertionError(f"it never said {until}")

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_training_that_was_stopped_and_woken_goes_on(
    bench: Bench, tmp_path: Path, whole: Path, running: Callable[..., subprocess.Popen[str]]
) -> None:
    process = running("step  0/12", command(bench, tmp_path))
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert results(tmp_path) == results(whole)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if line["kind"] == "train"]
    assert rates and all(0 < rate < 1e9 for rate in rates)


# --- the command line ---------------------------------------------------------


def test_going_on_where_all_is_done_does_nothing(bench: Bench, tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    ended = bench.run(*bench.train(tmp_path / "run", *STEPS, "--resume", "--json"))
    assert "nothing to do: step 12 of 12 was the last" in ended.err
    told = json.loads(ended.out)
    assert told["steps"] == 12
    assert results(tmp_path / "run") == results(whole)
    # What it has come to is told all the same: of a run that was killed between its last save and its
    # record, run.json would lack it.
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    last = {line["kind"]: line["loss"] for line in lines}
    assert (told["train_loss"], told["valid_loss"]) == (last["train"], last["valid"])


def test_going_on_with_other_settings_shows_a_table(bench: Bench, tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    more = ["--resume", "--learning-rate", "0.5", "--set", "adapter.rank=3"]
    ended = bench.server.run(bench.train(tmp_path / "run", *STEPS, *more))
    assert ended.code == 2
    table = {line.split()[0]: line.split()[1:] for line in ended.err.splitlines()[:-1]}
    assert table["learning_rate"] == ["0.01", "0.5"] and table["adapter.rank"] == ["2", "3"]
    assert "learning_rate 0.01 -> 0.5" in one_line(ended.err)


def test_a_training_that_has_not_ended_is_not_begun_again_unasked(
    bench: Bench, tmp_path: Path, whole: Path
) -> None:
    checkpoints = tmp_path / "a.checkpoints" / "step-0000004"
    shutil.copytree(early(bench) / "a.checkpoints" / "step-0000004", checkpoints)
    ended = bench.server.run(bench.train(tmp_path, *STEPS))
    assert ended.code == 5 and "--resume" in one_line(ended.err)
    assert valid(tmp_path) == [4]
    ended = bench.server.run(bench.train(tmp_path, *STEPS, "--resume", "--overwrite"))
    assert ended.code == 2
    bench.run(*bench.train(tmp_path, *STEPS, "--overwrite"))
    assert results(tmp_path) == results(whole)


def test_going_on_from_nowhere_is_told(bench: Bench, tmp_path: Path) -> None:
    ended = bench.server.run(bench.train(tmp_path, *STEPS, "--resume"))
    assert ended.code == 4
    assert "there is no checkpoint that verifies" in one_line(ended.err)


# --- plugins ------------------------------------------------------------------

LOUD = """
import mlx.nn as nn
from mlxlora_core.api import Adapter, hookimpl

calls = 0

class Loud(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.shift = nn.Linear(1, linear.weight.shape[0])
        self.shift.unfreeze()

    def __call__(self, x):
        global calls
        calls += self.training
        if calls > 9:
            raise KeyError("too loud")
        return self.linear(x) + self.shift.bias

@hookimpl
def mlxlora_adapters():
    return [Adapter(
        name="loud", summary="Raises in the middle",
        wrap=lambda linear, place, options: Loud(linear), fuse=lambda module, weight: weight,
    )]
"""


def test_a_plugin_that_raises_in_a_step_is_named_and_what_was_saved_stays(
    bench: Bench, tmp_path: Path
) -> None:
    plugin = tmp_path / "loud.py"
    plugin.write_text(LOUD)
    arguments = [a for a in bench.train(tmp_path, *STEPS, "--save-every", "1") if "adapter." not in str(a)]
    arguments = [a for i, a in enumerate(arguments) if a != "--set"]
    ended = bench.server.run([*arguments, "-P", plugin, "--adapter", "loud"])
    assert ended.code == 8, ended.err
    assert "loud" in one_line(ended.err) and "too loud" in ended.err
    assert valid(tmp_path)[0] >= 1
    # Without the plugin it is said what is missing.
    ended = bench.server.run([*arguments, "--adapter", "loud", "--resume"])
    assert ended.code == 8 and "made with plugins that are not active: loud" in one_line(ended.err)
