"""A training that no run is around leaves a report."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import cli
from mlxlora_core.runs.report.facts import read_facts

Train = Callable[..., int]


@pytest.fixture
def tiny_model(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    folder = tmp_path / "model"
    assert cli.execute(["convert", "--torch-path", str(tiny_checkpoint), "--mlx-path", str(folder)]) == 0
    return folder


@pytest.fixture
def train(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> Train:
    def run(*more: object, iters: int = 20) -> int:
        files = ("--model", tiny_model, "--data", tiny_data, "--adapter-file", tmp_path / "a.safetensors")
        flags = ("--iters", iters, "--steps-per-report", 5, "--steps-per-eval", 10, "--save-every", 5)
        return cli.execute([str(word) for word in ("train", *files, *flags, *more)])

    return run


def page(folder: Path) -> str:
    text = (folder / "report.html").read_text("utf-8")
    return re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))


def test_a_training_leaves_a_report_of_its_log(train: Train, tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    assert train("--metrics-file", metrics, "--warmup", 4) == 0
    folder = tmp_path / "a.checkpoints"
    log = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == log
    text = page(folder)
    assert "mlxlora train" in text and "rises over 4 steps (warm-up)" in text
    losses = [line["loss"] for line in log if line["kind"] == "valid"]
    assert f"The validation loss went from {losses[0]:.4f} to {losses[-1]:.4f}." in text
    assert "To be done" not in text and "Does it generalise" not in text
    facts = read_facts(folder)
    assert not facts.faults and facts.results["train"]["steps"] == 20


def test_a_training_that_is_resumed_has_its_whole_log(train: Train, tmp_path: Path) -> None:
    assert train(iters=10) == 0
    assert train("--resume", iters=20) == 0
    facts = read_facts(tmp_path / "a.checkpoints")
    assert [report["step"] for report in facts.train] == [5, 10, 15, 20]
    assert facts.results["train"]["steps"] == 20


def test_a_report_can_be_made_of_a_training_that_was_killed(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "a.safetensors"
    command: list[Any] = [
        sys.executable,
        "-m",
        "mlxlora_core",
        "train",
        "--model",
        tiny_model,
        "--data",
        tiny_data,
    ]
    command += ["--adapter-file", adapter, "--iters", "1000000", "--steps-per-report", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step       3/"):
                break
        process.send_signal(signal.SIGKILL)
    folder = tmp_path / "a.checkpoints"
    assert cli.execute(["report", str(folder)]) == 0
    assert capfd.readouterr().out.strip() == str(folder / "report.html")
    assert "To be done: train" in page(folder)


@pytest.mark.parametrize("name", ["report.html", "run.json", "metrics.jsonl", "recipe.toml"])
def test_a_folder_of_somebody_else_is_left_alone(train: Train, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "a.checkpoints" / name
    theirs.parent.mkdir()
    theirs.write_text("mine")
    assert train() in (3, 5)
    assert theirs.read_text() == "mine" and [path.name for path in theirs.parent.iterdir()] == [name]
    assert not (tmp_path / "a.safetensors").exists()


def test_what_is_refused_before_it_begins_leaves_no_folder(train: Train, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert train("--set", "adapter.rank=4096") == 2
    assert sorted(tmp_path.iterdir()) == before


def test_test_rows_are_told_of_after_what_is_wrong(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert train("--test", "--max-seq-length", 4, "--set", "adapter.rank=4096") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not fit a linear" in line
    assert train("--test", "--max-seq-length", 4, iters=1) == 0
    assert "test rows were cut at 4 tokens" in capsys.readouterr().err
