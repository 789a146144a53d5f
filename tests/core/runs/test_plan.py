"""A stage is done again when, and only when, its outcome depends on what has changed."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from mlxlora_core.errors import ModelError
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.plan import fingerprints
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.recipe_source import read

ROWS = {"data", "before", "train", "after"}  # what depends on the rows
BASE = {"model", "before", "train", "after"}
TRAINED = {"train", "after"}
MEASURED = {"before", "after"}
BOTH = MEASURED | TRAINED

#: what the recipe of these tests sets otherwise -> what that changes the outcome of, thought out by hand
CHANGES = {
    "run.seed=4": BOTH,
    "model.dtype=float32": BASE,
    "model.format=npz": BASE,
    "quantize.use=affine": BASE,
    "data.split_seed=5": ROWS,
    "data.test_set_size=0.2": ROWS,
    "data.write_batch_size=5": set(),
    "adapter.rank=4": TRAINED,
    "adapter.layers=1": TRAINED,
    "adapter.use=dora": TRAINED,
    "train.iters=5": TRAINED,
    "train.learning_rate=1e-3": TRAINED,
    "train.steps_per_report=2": TRAINED,  # the log is another
    "train.batch_size=3": BOTH,
    "train.max_seq_length=50": BOTH,
    "train.mask_prompt=true": BOTH,
    "train.prefix_memory_mb=5": set(),
    "checkpoints.save_every=3": set(),
    "checkpoints.keep=1": set(),
    "checkpoints.save_minutes=3": set(),
    "evaluate.test_batches=1": MEASURED,
    "evaluate.score_rows=3": MEASURED,
    "evaluator.seconds=5": MEASURED,
    "generate.num_tokens=3": MEASURED,
    "generate.prompts=A": MEASURED,
    "sampler.use=temperature": MEASURED,
    "observe.use=csv": set(),
    "export.use=npz": {"export"},
    # the same, written otherwise
    "train.iters=4": set(),
    "train.learning_rate=0.01": set(),
    "adapter.use=lora:lora": set(),
}

Marks = Callable[..., dict[str, str]]


@pytest.fixture
def marks(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, registry: Registry) -> Marks:
    """The fingerprints of the stages of a recipe with some values set."""
    program = tmp_path / "score"
    program.write_text("#!/bin/sh\necho 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "more.jsonl").write_text('{"text": "more"}\n')
    recipe = {
        "run": {"seed": 3},
        "model": {"torch_path": str(tiny_checkpoint)},
        "data": {"use": "jsonl", "extra_rows": "more.jsonl", "options": {"path": str(tiny_data)}},
        "adapter": {"use": "lora", "options": {"rank": 2}},
        "train": {"iters": 4, "learning_rate": 1e-2},
        "evaluate": {"general_rows": "more.jsonl"},
        "evaluator": {"use": "command", "options": {"program": f"{program} {tmp_path / 'key'} words"}},
    }
    (tmp_path / "r.toml").write_text(tomli_w.dumps(recipe))

    def marks(*sets: str) -> dict[str, str]:
        held: Recipe = read(tmp_path / "r.toml", sets, registry)
        return fingerprints(held)

    return marks


def again(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage, mark in after.items() if before.get(stage) != mark}


@pytest.mark.parametrize("change", CHANGES)
def test_a_value_undoes_what_depends_on_it_and_nothing_else(marks: Marks, change: str) -> None:
    assert again(marks(), marks(change)) == CHANGES[change]


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("data/train.jsonl", ROWS),
        ("data/valid.jsonl", ROWS),
        ("more.jsonl", ROWS),  # rows to train on, and those of another kind
        ("score", MEASURED),
        ("key", MEASURED),
        ("r.toml", set()),
    ],
)
def test_a_file_undoes_what_is_read_from_it(
    marks: Marks, tmp_path: Path, file: str, stages: set[str]
) -> None:
    (tmp_path / "key").write_text("answers\n")
    before, path = marks(), tmp_path / file
    was = path.stat()
    path.write_bytes(path.read_bytes() + b"\n")
    after = marks()
    assert again(before, after) == stages
    # A time alone changes nothing.
    path.touch()
    assert marks() == after and was.st_size < path.stat().st_size


def test_a_model_that_is_not_there_is_told_before_anything_is_done(marks: Marks) -> None:
    with pytest.raises(ModelError, match=r"nowhere: there is no such folder or file"):
        marks("model.torch_path=nowhere")
