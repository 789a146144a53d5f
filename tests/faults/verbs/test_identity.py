"""What something is, is told by its contents: a base, a plugin's code, rows, a folder of checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from test_paths import RECIPE, WORKING, Base, base, line

from mlxlora_core import cli
from mlxlora_core.files import lock, tensor_file

__all__ = ["base"]

Capfd = pytest.CaptureFixture[str]

ADAPTER = """
import mlx.core as mx, mlx.nn as nn
from mlxlora_core.api import Adapter, NoOptions, hookimpl
FACTOR = 1.0
class Bias(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.linear.freeze()
        self.b = mx.zeros((linear.weight.shape[0],))
    def __call__(self, x):
        return self.linear(x) + FACTOR * self.b
@hookimpl
def mlxlora_adapters():
    wrap = lambda linear, place, options: Bias(linear)
    return [Adapter(name="bias", summary="x", options=NoOptions, wrap=wrap, fuse=lambda m, w: w)]
"""

BUILDER = """
from dataclasses import dataclass
from mlxlora_core.api import DatasetBuilder, NoOptions, Row, Rows, hookimpl
WORDS = "A layer scales the weights."
@hookimpl
def mlxlora_dataset_builders():
    build = lambda options: Rows([Row({"text": f"{WORDS} {i}"}) for i in range(20)])
    return [DatasetBuilder(name="made", summary="x", options=NoOptions, build=build, inputs=lambda o: {})]
"""


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Change a file and leave its size and its time as they were."""
    state = path.stat()
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def said(capfd: Capfd, code: int, *arguments: object) -> str:
    """stderr of a command line that ends with ``code``."""
    capfd.readouterr()
    got = cli.execute([str(argument) for argument in arguments])
    err = capfd.readouterr().err
    assert got == code, err
    return err


def tamper(model: Path) -> None:
    """Change one weight and nothing that the file says of itself."""
    path = model / "model.safetensors"
    stated = tensor_file.stated(path)
    content = path.read_bytes()
    edit(path, content[-64:], bytes([content[-64] ^ 1]) + content[-63:])
    assert tensor_file.stated(path) == stated


def test_an_adapter_does_not_fit_a_base_whose_header_alone_is_that_of_its_own(
    base: Base, tmp_path: Path, capfd: Capfd
) -> None:
    model = Path(shutil.copytree(base.model, tmp_path / "model"))
    ask = ("--model", model, "--adapter-file", base.adapter)
    said(capfd, 0, "generate", *ask, "-p", "A", "-n", 1)
    tamper(model)
    assert "base" in said(capfd, 4, "generate", *ask, "-p", "A", "-n", 1)
    assert "base" in said(capfd, 4, "fuse", *ask, "--save-path", tmp_path / "fused")
    assert "base" in said(capfd, 4, "export", *ask, "--to", "npz", "--out", tmp_path / "out")


def test_a_training_does_not_go_on_with_a_base_that_has_changed(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(base.model, tmp_path / "model"))
    arguments = line("train", WORKING["train"](base) | {"model": model})
    said(capfd, 0, *arguments)
    tamper(model)
    assert "another base" in said(capfd, 4, *arguments, "--resume")


def test_a_training_that_goes_on_with_an_edited_plugin_says_so(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin = tmp_path / "adp.py"
    plugin.write_text(ADAPTER)
    arguments = [*line("train", WORKING["train"](base)), "-P", "./adp.py", "--adapter", "bias"]
    said(capfd, 0, *arguments)
    assert "warning: the code" not in said(capfd, 0, *arguments, "--iters", 2, "--resume")
    edit(plugin, b"FACTOR = 1.0", b"FACTOR = 9.0")
    err = said(capfd, 0, *arguments, "--iters", 3, "--resume")
    assert "warning: the code of plugin adp has changed since" in err


def test_a_run_builds_again_with_an_edited_plugin_and_not_with_one_that_was_only_touched(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made.py").write_text(BUILDER)
    text = RECIPE.format(checkpoint=base.checkpoint, rows=base.rows)
    text = text.replace('use = "jsonl"', 'use = "made"').replace(f'options = {{ path = "{base.rows}" }}', "")
    (tmp_path / "recipe.toml").write_text(text)
    arguments = ("run", "recipe.toml", "-P", "./made.py", "--set", "run.folder=r")
    said(capfd, 0, *arguments)
    os.utime("made.py")
    os.utime(base.checkpoint / "params.json")
    assert said(capfd, 0, *arguments).count("done already") == 5
    edit(tmp_path / "made.py", b"scales the", b"SCALES the")
    err = said(capfd, 0, *arguments)
    assert "[model] done already" in err and "[data] done already" not in err
    assert "SCALES" in (tmp_path / "r" / "data" / "train.jsonl").read_text()


@pytest.mark.parametrize("name", ["a.npz", "link.safetensors", "other/a.safetensors"])
def test_two_trainings_never_share_a_folder_of_checkpoints(
    name: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.checkpoints").mkdir()
    Path("other").symlink_to(tmp_path)
    Path("link.checkpoints").symlink_to("a.checkpoints")
    with lock.hold(tmp_path / "a.checkpoints"):
        err = said(capfd, 9, *line("train", WORKING["train"](base) | {"adapter_file": name}))
    assert "is in use by process" in err
