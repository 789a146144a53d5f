"""SIGKILL at any instant: what was there is intact, and the next run ends bit for bit the same.

The suite takes a seeded sample of the instants; ``MLXLORA_TEST_ALL=1`` takes
every durable operation, and two hundred random times.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bench import Bench
from forkserver import MUTANTS, Ended

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
SAMPLE = 2  # instants a scenario in the suite, beside the last
CHECKS = range(
    2, 10, 1 if ALL else 3
)  # those in which a run looks whether it may write, before its record is there
KILLS = 200 if ALL else 8

RECIPE = """
[run]
folder = "{folder}"
[model]
torch_path = "{checkpoint}"
dtype = "float32"
[data]
use = "jsonl"
options = {{ path = "{data}" }}
[adapter]
options = {{ rank = 2, layers = 1, dropout = 0.2 }}
[train]
iters = 10
batch_size = 2
learning_rate = 1e-2
steps_per_report = 3
steps_per_eval = 5
[checkpoints]
save_every = 4
"""


@dataclass(frozen=True)
class Scenario:
    """A command that writes files, and how a user goes on after it was killed.

    Attributes:
        command: makes the command line for a folder.
        goes_on: makes those to try in turn afterwards; the last must succeed if none before did.
        results: the files that must be the same, below the folder.
        whole: the folder or file that appears whole or not at all, or nothing.
    """

    command: Callable[[Bench, Path], list[object]]
    goes_on: Callable[[Bench, Path], list[list[object]]]
    results: tuple[str, ...]
    whole: str = ""


def train(bench: Bench, folder: Path, *more: object) -> list[object]:
    return bench.train(folder, *more)


#: all that saves work and must change nothing
SAVING = ("--packing", "on", "--reuse-prefix", "on", "--compile", "on")


def train_saving(bench: Bench, folder: Path, *more: object) -> list[object]:
    return bench.train(folder, *SAVING, *more)


def convert(bench: Bench, folder: Path, *more: object) -> list[object]:
    return ["convert", "--torch-path", bench.checkpoint, "--mlx-path", folder / "model", *more]


def data(bench: Bench, folder: Path, *more: object) -> list[object]:
    rows = f"path={bench.data}"
    return ["data", "--builder", "jsonl", "--set", rows, "--out", folder / "rows", *more]


def fuse(bench: Bench, folder: Path, *more: object) -> list[object]:
    adapter = bench.folder / "reference-train" / "a.safetensors"
    return ["fuse", "--model", bench.model, "--adapter-file", adapter, "--save-path", folder / "fused", *more]


def export(bench: Bench, folder: Path, *more: object) -> list[object]:
    adapter = bench.folder / "reference-train" / "a.safetensors"
    base = ["--model", bench.model, "--adapter-file", adapter]
    return ["export", "--to", "hf", *base, "--out", folder / "exported", *more]


def export_one_file(bench: Bench, folder: Path, *more: object) -> list[object]:
    adapter = bench.folder / "reference-train" / "a.safetensors"
    base = ["--model", bench.model, "--adapter-file", adapter]
    return [
        "export",
        "--to",
        "gguf",
        "--set",
        "export.context_length=64",
        *base,
        "--out",
        folder / "exported.gguf",
        *more,
    ]


def run(bench: Bench, folder: Path) -> list[object]:
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder / "run", checkpoint=bench.checkpoint, data=bench.data))
    return ["run", recipe]


def train_from_files(bench: Bench, folder: Path, *more: object) -> list[object]:
    return bench.train(folder, "--prefix-memory-mb", 0, *more)


LAST = "a.checkpoints/step-0000040/"
TRAINED = ("a.safetensors", LAST + "adapter.safetensors", LAST + "optimizer.safetensors")
MODEL = ("config.json", "model.safetensors", "tokenizer.model")
SCENARIOS = {
    "train": Scenario(
        train,
        lambda bench, folder: [train(bench, folder, "--resume"), train(bench, folder)],
        TRAINED,
    ),
    "train, saving work": Scenario(
        train_saving,
        lambda bench, folder: [train_saving(bench, folder, "--resume"), train_saving(bench, folder)],
        TRAINED,
    ),
    "train from files": Scenario(  # and to the bits of what is kept in memory
        train_from_files,
        lambda bench, folder: [train(bench, folder, "--resume"), train(bench, folder)],
        ("a.safetensors", LAST + "adapter.safetensors", LAST + "optimizer.safetensors"),
    ),
    "convert": Scenario(
        convert,
        lambda bench, folder: [convert(bench, folder, "--overwrite")],
        tuple(f"model/{name}" for name in MODEL),
        "model",
    ),
    "data": Scenario(
        data,
        lambda bench, folder: [data(bench, folder, "--overwrite")],
        ("rows/train.jsonl", "rows/valid.jsonl", "rows/test.jsonl"),
        "rows",
    ),
    "fuse": Scenario(
        fuse,
        lambda bench, folder: [fuse(bench, folder, "--overwrite")],
        tuple(f"fused/{name}" for name in MODEL),
        "fused",
    ),
    "export": Scenario(
        export,
        lambda bench, folder: [export(bench, folder, "--overwrite")],
        tuple(f"exported/{name}" for name in (*MODEL, "tokenizer_config.json", "README.md", "export.json")),
        "exported",
    ),
    "export one file": Scenario(
        export_one_file,
        lambda bench, folder: [export_one_file(bench, folder, "--overwrite")],
        ("exported.gguf",),
        "exported.gguf",
    ),
    "run": Scenario(
        run,
        lambda bench, folder: [run(bench, folder)],
        (
            "run/adapter/adapter.safetensors",
            "run/checkpoints/step-0000010/optimizer.safetensors",
            *(f"run/model/{name}" for name in MODEL),
            "run/data/train.jsonl",
        ),
    ),
}


@pytest.fixture(scope="session")
def reference(bench: Bench) -> Callable[[str], tuple[dict[str, bytes], int]]:
    """Runs a scenario undisturbed, once: its results, and how many durable operations it took."""
    made: dict[str, tuple[dict[str, bytes], int]] = {}

    def make(name: str) -> tuple[dict[str, bytes], int]:
        if name not in made:
            if name in ("fuse", "export", "export one file"):
                make("train")
            folder = bench.folder / f"reference-{name}"
            folder.mkdir()
            ended = bench.run(*SCENARIOS[name].command(bench, folder))
            made[name] = results(name, folder), ended.operations
        return made[name]

    return make


def results(name: str, folder: Path) -> dict[str, bytes]:
    """The files that must be the same."""
    return {file: (folder / file).read_bytes() for file in SCENARIOS[name].results}


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without what is a matter of time and place."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


def litter(folder: Path) -> list[str]:
    """Hidden names below a folder, where temporary files stand."""
    return sorted(path.name for path in folder.rglob(".*"))


def go_on(bench: Bench, name: str, folder: Path) -> Ended:
    """Do what a user does after a kill, which must succeed."""
    for command in SCENARIOS[name].goes_on(bench, folder):
        ended = bench.server.run(command)
        if ended.code == 0:
            return ended
        assert ended.code == 4 and "there is no checkpoint" in ended.err, ended.err
    raise AssertionError(ended.err)


def kill_and_go_on(bench: Bench, name: str, folder: Path, kill: int, want: dict[str, bytes]) -> None:
    """Kill a scenario before one durable operation, look at what there is, and go on."""
    folder.mkdir()
    ended = bench.server.run(SCENARIOS[name].command(bench, folder), kill=kill)
    assert ended.code == -9, f"not killed at {kill}: {ended.err}"
    whole = SCENARIOS[name].whole
    if whole and (folder / whole).exists():
        assert results(name, folder) == want, f"killed at {kill}: half of it is there"
    go_on(bench, name, folder)
    assert results(name, folder) == want, f"killed at {kill}: another result"
    assert litter(folder) == [], f"killed at {kill}"


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_before_any_durable_operation_loses_nothing(
    bench: Bench, tmp_path: Path, name: str, reference: Callable[[str], tuple[dict[str, bytes], int]]
) -> None:
    want, operations = reference(name)
    assert operations > 20, "or nothing is counted"
    every = range(1, operations + 1)
    early = CHECKS if name == "run" else ()
    chosen = every if ALL else sorted({*random.Random(name).sample(every, SAMPLE), *early, operations})
    for kill in chosen:
        kill_and_go_on(bench, name, tmp_path / str(kill), kill, want)
        if name.startswith("train"):
            whole = bench.folder / f"reference-{name}" / "metrics.jsonl"
            assert metrics(tmp_path / str(kill) / "metrics.jsonl") == metrics(whole)


def test_kills_at_random_times_over_chains_of_resumes_change_nothing(
    bench: Bench, tmp_path: Path, reference: Callable[[str], tuple[dict[str, bytes], int]]
) -> None:
    want, _ = reference("train")
    draw = random.Random(0)
    kills, chain = 0, 0
    while kills < KILLS:
        chain += 1
        folder = tmp_path / str(chain)
        folder.mkdir()
        for _ in range(10):
            resume = (folder / "a.checkpoints").is_dir() and any((folder / "a.checkpoints").glob("step-*"))
            command = train(bench, folder, *(["--resume"] if resume else []))
            ended = bench.server.run(command, after_seconds=draw.uniform(0.02, 0.8))
            assert ended.code in (0, -9), ended.err
            kills += ended.code != 0
            assert len(litter(folder)) <= 6, "three locks, and what one process had at hand"
            if ended.code == 0:
                break
        go_on(bench, "train", folder)
        assert results("train", folder) == want
        assert litter(folder) == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_resume_that_forgets_something_is_found_out(
    bench: Bench,
    tmp_path: Path,
    mutant: str,
    reference: Callable[[str], tuple[dict[str, bytes], int]],
) -> None:
    """The comparison has the power to see what must not be forgotten."""
    want, operations = reference("train")
    assert bench.server.run(train(bench, tmp_path), kill=operations // 2).code == -9
    ended = bench.server.run(train(bench, tmp_path, "--resume"), mutant=mutant)
    assert ended.code == 0 and "resumed at step 16 of 40" in ended.err, ended.err
    assert results("train", tmp_path) != want
