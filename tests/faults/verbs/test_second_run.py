"""Catalogue 86, 88, 89: two writers, and readers beside a writer."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from processes import Program, ended

from mlxlora_core import cli
from mlxlora_core import plugins as registry
from mlxlora_core.errors import ModelError
from mlxlora_core.files import durable, tensor_file
from mlxlora_core.model import folder as model_folder
from mlxlora_core.model import loading, stored

RECIPE = """
[run]
folder = "{folder}"
[model]
mlx_path = "{model}"
[data]
use = "jsonl"
options = {{ path = "{rows}" }}
[train]
iters = 1
"""


def second(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a run that finds its place taken."""
    capfd.readouterr()
    assert cli.execute([str(argument) for argument in arguments]) == 9
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_two_runs_in_one_folder(
    program: Program, tiny_model: Path, tiny_rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = program.folder / "recipe.toml", program.folder / "run"
    recipe.write_text(RECIPE.format(folder=folder, model=tiny_model, rows=tiny_rows))
    first = program.start("run", recipe, at="metrics.jsonl")
    held = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    line = second(capfd, "run", recipe)
    assert f"{folder}: is in use by process {first.pid} on {os.uname().nodename} since " in line
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == held
    program.go_on()
    assert ended(first).returncode == 0
    assert cli.execute(["run", str(recipe)]) == 0
    assert not (program.folder / ".run.lock").exists()


def test_two_conversions_to_one_target(
    program: Program, tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--torch-path", tiny_checkpoint, "--mlx-path", program.folder / "model")
    first = program.start("convert", *arguments, at=".safetensors.")
    assert f"process {first.pid} " in second(capfd, "convert", *arguments)
    program.go_on()
    assert ended(first).returncode == 0
    loading.load(program.folder / "model", registry.load(environ={registry.ALLOW_LIST: ""}))
    assert sorted(path.name for path in program.folder.iterdir()) == ["mark", "mark.go", "model", "watch.py"]


@pytest.mark.parametrize(
    ("verb", "target", "arguments"),
    [
        ("data", "rows", "--builder jsonl --set path=there"),
        ("fuse", "fused", "--model there --adapter-file there"),
        ("train", "a.safetensors", "--model there --data there"),
    ],
)
def test_every_verb_that_writes_looks_for_another_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str, target: str, arguments: str
) -> None:
    from mlxlora_core.files import lock

    flag = {"data": "--out", "fuse": "--save-path", "train": "--adapter-file"}[verb]
    with lock.hold(tmp_path / target):
        line = second(capfd, verb, *arguments.split(), flag, tmp_path / target)
    assert f"is in use by process {os.getpid()} on " in line


# --- readers ------------------------------------------------------------------


def save_for_ever(path: Path, begun: Any) -> None:
    """Write one adapter after another, each of one number in all its places."""
    number = 0
    while True:
        number += 1
        tensors = [(f"layers.{i}.a", mx.full((64, 64), number, mx.float32)) for i in range(8)]
        tensor_file.save(path, tensors, {"number": str(number)}, len(tensors))
        begun.set()


def test_who_reads_while_another_saves_sees_one_state_and_no_mixture(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    writer = context.Process(target=save_for_ever, args=(path, begun), daemon=True)
    writer.start()
    assert begun.wait(60)
    seen = set()
    for _ in range(300):
        tensors, metadata = tensor_file.load(path)
        values = {float(value) for tensor in tensors.values() for value in (tensor.min(), tensor.max())}
        assert values == {float(metadata["number"])} and len(tensors) == 8
        seen |= values
    assert writer.is_alive(), "it saved all the while"
    writer.kill()
    writer.join()
    assert len(seen) > 3, "there was something to be mixed up"


def test_a_model_folder_that_is_replaced_while_it_is_read_is_not_taken(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other model fits in every shape, so that nothing else would tell."""
    plugins = registry.load(environ={registry.ALLOW_LIST: ""})
    target = tmp_path / "model"

    def write(**changes: object) -> None:
        ours = model_folder.holds_only_a_model
        with durable.new_folder(target, overwrite=True, ours=ours) as new:
            for path in tiny_model.iterdir():
                durable.copy_file(path, new / path.name)
            config = json.loads((new / "config.json").read_text())
            durable.write_json(new / "config.json", config | changes)

    read = stored.read_weights

    def replaced(folder: Path) -> Any:
        write(rope_theta=5000.0)
        return read(folder)

    write()
    monkeypatch.setattr(stored, "read_weights", replaced)
    with pytest.raises(ModelError, match="replaced while it was read"):
        loading.load(target, plugins)
    monkeypatch.undo()
    assert loading.load(target, plugins).config["rope_theta"] == 5000.0
