"""Runs that observers look on at: TensorBoard shows what the run told, and no observer harms a run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")

ODD = """
import errno, os, pathlib, time
from mlxlora_core.api import Observer, hookimpl

HERE = pathlib.Path(__file__).parent


class Watcher:
    def __init__(self, run):
        self.run = run

    def event(self, event):
        pass

    def end(self, how):
        pass


class Hangs(Watcher):
    \"\"\"At a step, until another observer has been told that the training is done.\"\"\"

    def event(self, event):
        if event["kind"] == "train" and event["step"] == 2:
            while not (HERE / "done").exists():
                time.sleep(0.02)


class Stuck(Watcher):
    def event(self, event):
        time.sleep(1000)


class Refused(Watcher):
    def event(self, event):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Breaks(Watcher):
    def event(self, event):
        event.clear()
        raise RuntimeError("no good")


class Exits(Watcher):
    def event(self, event):
        os._exit(3)


class Moves(Watcher):
    def event(self, event):
        os.chdir("/")


class Fills(Watcher):
    quiet = False

    def event(self, event):
        if event["kind"] == "train" and event["step"] == 2:
            try:
                with open(self.run.folder / f"fill-{self.quiet}", "wb", buffering=0) as file:
                    while file.write(bytes(1 << 16)):
                        pass
            except OSError:
                if not self.quiet:
                    raise


class FillsQuietly(Fills):
    quiet = True


class Tells(Watcher):
    def event(self, event):
        with open(HERE / f"told-{self.run.name}", "a") as file:
            print(event["kind"], event.get("step"), event.get("loss"), file=file)
        if event["kind"] == "train_result":
            (HERE / "done").touch()


@hookimpl
def mlxlora_observers():
    kinds = (Hangs, Stuck, Refused, Breaks, Exits, Moves, Fills, FillsQuietly, Tells)
    return [
        Observer(name=kind.__name__.lower(), summary="s", start=lambda run, options, kind=kind: kind(run))
        for kind in kinds
    ]
"""


def train(model: Path, data: Path, adapter: Path, *more: object) -> list[str]:
    files = ("--model", model, "--data", data, "--adapter-file", adapter, "--steps-per-report", 1)
    return [sys.executable, "-m", "mlxlora_core", "train", *map(str, (*files, *more))]


def watched(plugin: Path, *names: str) -> list[object]:
    return ["-P", plugin, *(word for name in (*names, "tells") for word in ("--observer", name))]


def test_no_observer_stops_or_changes_a_training(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    odd = ("hangs", "refused", "breaks", "exits", "moves", *(["stuck"] if ALL else []))
    plugin = tmp_path / "odd.py"
    plugin.write_text(ODD)
    ended = {}
    for name, more in (("a", ()), ("b", odd)):
        (tmp_path / "done").unlink(missing_ok=True)
        command = train(tiny_model, tiny_data, Path(f"{name}.safetensors"), "--iters", 5)
        command += map(str, watched(plugin, *more))
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ended[name] = done.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    told = (tmp_path / "told-a").read_text()
    assert told == (tmp_path / "told-b").read_text() and told.count("train ") == 5
    for name in ("refused", "breaks", "exits"):
        assert ended["b"].count(f"observer odd:{name} failed in event and is left out") == 1, ended["b"]
    late = "observer odd:stuck is still at work 10 s after the end and is left out"  # those are waited for
    assert ended["b"].count(late) == ALL
    assert "observer odd:hangs" not in ended["b"], "it had time to end"
    assert ended["b"].count("observer odd:moves, in event, has changed the working folder") == 1
    assert "Traceback" not in ended["b"]


@pytest.mark.parametrize("name", ["fills", "fillsquietly"])
def test_a_disk_that_an_observer_fills_has_room_for_the_training(
    name: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs a file system of its own: unshare")
    (tmp_path / "odd.py").write_text(ODD)
    (small := tmp_path / "small").mkdir()
    settings = ("--iters", 6, "--save-every", 2, *watched(tmp_path / "odd.py", name))
    line = shlex.join(train(tiny_model, tiny_data, small / "a.safetensors", *settings))
    after = f"ls -l {small} {small}/a.checkpoints; cp {small}/a.safetensors {tmp_path}"
    script = f"mount -t tmpfs -o size=96m tmpfs {small} && {line} && {after}"
    done = subprocess.run([*alone, "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    left_out = "observer odd:fills failed in event and is left out: OSError: [Errno 28]"
    assert done.stderr.count(left_out) == (name == "fills")
    (size,) = [int(line.split()[4]) for line in done.stdout.splitlines() if " fill-" in line]
    assert size > 50 << 20 and "step-0000006" in done.stdout, "it was full, and all was written"
    plain = train(tiny_model, tiny_data, tmp_path / "b.safetensors", "--iters", 6)
    assert subprocess.run(plain, capture_output=True, timeout=120).returncode == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tensorboard_shows_a_training_that_was_stopped_and_taken_up_again(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = tmp_path / "log.jsonl"
    more: tuple[Any, ...] = ("--observer", "tensorboard", "--metrics-file", log, "--steps-per-eval", 5)
    command = train(tiny_model, tiny_data, tmp_path / "a.safetensors", *more)
    with subprocess.Popen([*command, "--iters", "1000000"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step       7/"):
                break
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(60) == 130
    with subprocess.Popen(
        [*command, "--iters", "1000000", "--resume"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for number, _ in enumerate(process.stderr):
            if number > 15:
                break
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(60) == 130
    told = [json.loads(line) for line in log.read_text().splitlines()]
    shown = reader.EventAccumulator(str(tmp_path / "a.tensorboard"), {"scalars": 0}).Reload()
    for kind in ("train", "valid"):
        wanted = [(one["step"], one["loss"]) for one in told if one["kind"] == kind]
        found = [(event.step, event.value) for event in shown.Scalars(f"{kind}/loss")]
        assert [step for step, _ in found] == [step for step, _ in wanted], kind
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-6)
    rates = [event.value for event in shown.Scalars("train/learning_rate")]
    assert rates == pytest.approx([one["learning_rate"] for one in told if one["kind"] == "train"], rel=1e-6)
