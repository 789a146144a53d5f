"""``mlxlora run -n``: ranks do a recipe together, and come to what one process comes to."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import rank_work

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
COUNT = "3" if ALL else "2"
SENTENCES = [
    f"the {subject} {verb} the {object_}"
    for subject in ("layer", "adapter", "mask")
    for verb in ("scales", "keeps", "reads")
    for object_ in ("weights", "inputs", "array", "gradient")
]
RECIPE = """
[run]
seed = 1
[model]
torch_path = {checkpoint}
[data]
use = "jsonl"
options.path = {rows}
test_set_size = 0.2
[adapter]
use = "lora"
layers = 1
options.dropout = 0.1
[train]
iters = 24
batch_size = 4
learning_rate = 0.01
steps_per_eval = 6
steps_per_report = 1
patience = 3
[generate]
prompts = ["the layer"]
num_tokens = 4
"""


@pytest.fixture
def command(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., list[str]]:
    """A function that gives the command of a run into a folder."""
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "small.toml"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    recipe.write_text(RECIPE.format(checkpoint=json.dumps(str(tiny_checkpoint)), rows=json.dumps(str(rows))))

    def make(folder: Path, *more: str) -> list[str]:
        main = [sys.executable, "-m", "mlxlora_core", "run", str(recipe)]
        return [*main, "--set", f"run.folder={folder}", *more]

    return make


def done(command: Sequence[str]) -> str:
    """What a command that succeeds tells on stderr."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=rank_work.SECONDS, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def record(folder: Path) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads((folder / "run.json").read_text())["stages"]
    return {name: stage["result"] for name, stage in stages.items()}


def test_ranks_come_to_what_one_process_comes_to(command: Callable[..., list[str]], tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    alone, told = done(command(one)), done(command(several, "-n", COUNT))
    assert told.count("[train] …") == 1, "one rank alone shows anything"
    assert [line.split()[1] for line in told.splitlines() if line.startswith("step")] == [
        line.split()[1] for line in alone.splitlines() if line.startswith("step")
    ]
    theirs, ours = record(one), record(several)
    assert theirs.keys() == ours.keys() and ours["data"] == theirs["data"]
    for stage in ("before", "after"):
        for split, loss in theirs[stage]["losses"].items():
            assert ours[stage]["losses"][split] == pytest.approx(loss, rel=1e-5)
        assert ours[stage]["answers"] == theirs[stage]["answers"]
    assert ours["train"]["adapter_step"] == theirs["train"]["adapter_step"]
    files = [mx.load(str(folder / "adapter" / "adapter.safetensors")) for folder in (one, several)]
    assert files[0].keys() == files[1].keys()
    assert all(mx.allclose(files[0][name], files[1][name], atol=1e-5, rtol=0) for name in files[0])
    if ALL:
        assert done(command(several, "-n", COUNT)).count("done already") == len(ours)


def test_a_rank_that_does_not_see_the_run_folder_ends_all(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    # Each rank is told of a folder of its own.
    apart = shlex.join(command(tmp_path / "of-RANK")).replace("RANK", "$MLX_RANK")
    ranks = rank_work.start(2, ["sh", "-c", f"exec {apart}"], tmp_path)
    (code, told), (other, why) = rank_work.finish(ranks)
    assert (code, other) == (10, 10), (told, why)
    assert "is not the folder that rank 0 writes the run into" in why and "rank 1" in told
