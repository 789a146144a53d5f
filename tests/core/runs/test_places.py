"""A run writes over nothing that it reads, and over nothing that no run has written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxlora_core.errors import MlxloraError, SafetyError, UsageError
from mlxlora_core.plugins import Registry
from mlxlora_core.runs import pipeline
from mlxlora_core.runs.folder import RunFolder
from mlxlora_core.runs.places import check_run, is_recipe
from mlxlora_core.runs.plan import plan
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.recipe_source import read
from mlxlora_core.runs.report import write_report

RECIPE = """
[model]
torch_path = "{checkpoint}"
dtype = "float32"
[data]
use = "jsonl"
options = {{ path = "{data}" }}
[train]
iters = 2
batch_size = 2
"""

Read = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, registry: Registry) -> Read:
    """Reads a recipe whose run folder is ``run``."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(checkpoint=tiny_checkpoint, data=tiny_data))

    def make(*sets: str) -> Recipe:
        return read(path, (f"run.folder={tmp_path / 'run'}", *sets), registry)

    return make


@pytest.fixture
def done(recipe: Read, registry: Registry, tmp_path: Path) -> Path:
    """The folder of a run that was done."""
    list(pipeline.run(recipe(), registry))
    return tmp_path / "run"


def checked(recipe: Recipe) -> None:
    check_run(recipe, RunFolder(recipe.folder).record)


def test_a_run_that_was_done_may_be_done_again(done: Path, recipe: Read, registry: Registry) -> None:
    assert is_recipe(done / "recipe.toml")
    checked(recipe("train.iters=3"))
    checked(read(done / "recipe.toml", (), registry))


@pytest.mark.parametrize(
    "name", ["recipe.toml", "report.html", "metrics.jsonl", "adapter/adapter.safetensors", "run.json"]
)
@pytest.mark.parametrize("linked", [False, True], ids=["there", "behind a link"])
def test_a_file_of_somebody_else_in_a_run_folder_stays(
    done: Path, recipe: Read, registry: Registry, tmp_path: Path, name: str, linked: bool
) -> None:
    path = done / name
    path.unlink()
    theirs = tmp_path / "theirs.safetensors"
    theirs.write_text('{"mine": true}\n')
    path.symlink_to(theirs) if linked else shutil.copy(theirs, path)
    with pytest.raises(MlxloraError) as caught:
        list(pipeline.run(recipe("train.iters=3"), registry))
    assert caught.value.exit_code in (3, 5)
    assert path.read_text() == theirs.read_text() == '{"mine": true}\n'
    if name == "report.html":
        with pytest.raises(SafetyError, match="left alone"):
            write_report(done)


@pytest.mark.parametrize("name", ["model", "data", "checkpoints"])
def test_a_folder_of_somebody_else_in_a_run_folder_stays(
    done: Path, recipe: Read, registry: Registry, tmp_path: Path, name: str
) -> None:
    shutil.rmtree(done / name)
    theirs = tmp_path / "theirs" / "step-0000003"
    theirs.mkdir(parents=True)
    (theirs / "notes.txt").write_text("precious")
    (done / name).symlink_to(theirs.parent)
    with pytest.raises(SafetyError, match="left alone"):
        list(pipeline.run(recipe("train.iters=3"), registry))
    assert (theirs / "notes.txt").read_text() == "precious"


def test_a_recipe_that_somebody_has_written_by_hand_is_none_of_a_run(done: Path, recipe: Read) -> None:
    path = done / "recipe.toml"
    text = path.read_text()
    for changed in (f"# my notes\n{text}", text.replace(" = ", "=", 1), "x = 1\n", "", "\udcff"):
        path.write_bytes(changed.encode("utf-8", "surrogateescape"))
        assert not is_recipe(path)
    path.write_text(f"# my notes\n{text}")
    with pytest.raises(SafetyError, match=r"recipe\.toml.*left alone"):
        checked(recipe())


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("data.path", "data"),
        ("data.path", "data/train.jsonl"),
        ("data.path", "checkpoints"),
        ("model.torch_path", "model"),
        ("model.torch_path", "model/config.json"),
    ],
)
def test_what_a_run_makes_is_none_of_what_it_reads(
    done: Path, recipe: Read, registry: Registry, key: str, name: str
) -> None:
    before = (done / "data" / "train.jsonl").read_bytes()
    with pytest.raises(UsageError, match="is an input of this command"):
        list(pipeline.run(recipe(f"{key}={done / name}"), registry))
    assert (done / "data" / "train.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "record", [None, "{}", '{"stages": {}}', '{"mlxlora": 1, "started": {}, "stages": {}}']
)
def test_a_folder_that_no_run_has_made_stays(
    recipe: Read, registry: Registry, tmp_path: Path, record: str | None
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("precious")
    if record is not None:
        (tmp_path / "run" / "run.json").write_text(record)
    with pytest.raises(MlxloraError) as caught:
        list(pipeline.run(recipe(), registry))
    assert caught.value.exit_code == (5 if record is None else 3)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        ["notes.txt", *(["run.json"] if record is not None else [])]
    )


def test_a_run_folder_whose_name_is_no_utf_8_is_known_by_its_own_recipe(
    recipe: Read, registry: Registry, tmp_path: Path, tiny_data: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"odd \xff%41")
    odd.mkdir()
    rows = shutil.copytree(tiny_data, odd / os.fsdecode(b"rows\xfe"))
    wanted = recipe(f"run.folder={odd / 'run'}", f"data.path={rows}")
    list(pipeline.run(wanted, registry))
    again = read(odd / "run" / "recipe.toml", (), registry)
    assert again.folder == odd / "run" and again.data.options.path == rows
    assert not any(plan(again).values()), "every stage holds"
    assert is_recipe(odd / "run" / "recipe.toml")
    write_report(odd / "run")
