"""Runs that observers look on at: TensorBoard shows what the run told, and no observer harms a run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ODD = """
import errno, os, time
from mlxlora_core.api import Observer, hookimpl


class Hangs:
    def event(self, event):
        if event["kind"] == "train" and event["step"] == 2:
            time.sleep({seconds})

    def end(self, how):
        pass


class Fills:
    def event(self, event):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def end(self, how):
        pass


class Breaks:
    def event(self, event):
        event.clear()
        raise RuntimeError("no good")

    def end(self, how):
        pass


@hookimpl
def mlxlora_observers():
    kinds = (("hangs", Hangs), ("fills", Fills), ("breaks", Breaks))
    return [Observer(name=n, summary=n, start=lambda run, options, k=k: k()) for n, k in kinds]
"""


def train(model: Path, data: Path, adapter: Path, *more: object) -> list[str]:
    files = ("--model", model, "--data", data, "--adapter-file", adapter, "--steps-per-report", 1)
    return [sys.executable, "-m", "mlxlora_core", "train", *map(str, (*files, *more))]


def test_no_observer_stops_or_changes_a_training(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD.replace("{seconds}", "3"))
    watched = [word for name in ("hangs", "fills", "breaks") for word in ("--observer", name)]
    plain = train(tiny_model, tiny_data, tmp_path / "a.safetensors", "--iters", 5)
    odd = train(tiny_model, tiny_data, tmp_path / "b.safetensors", "--iters", 5, *watched)
    assert subprocess.run(plain, capture_output=True, timeout=120).returncode == 0
    command = [*odd, "-P", str(tmp_path / "odd.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for name in ("fills", "breaks"):
        assert done.stderr.count(f"observer odd:{name} failed in event and is left out") == 1, done.stderr
    assert "Traceback" not in done.stderr


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
