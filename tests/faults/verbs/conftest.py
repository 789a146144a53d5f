"""What the fault tests share: mlxlora in processes of its own, and small things for it to work on."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import Program
from warm import Warm

from mlxlora_core import cli


def made(*arguments: object) -> None:
    """Run a verb in this process."""
    assert cli.execute([str(argument) for argument in arguments]) == 0


@pytest.fixture
def program(tmp_path: Path, warm: Warm) -> Program:
    """mlxlora in processes of their own."""
    folder = tmp_path / "program"
    folder.mkdir()
    return Program(folder, warm)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tiny_rows: Path) -> Path:
    """An adapter of the tiny model after two steps; read it, never write to it."""
    path = tiny_model.parent / "adapter.safetensors"
    made("train", "--model", tiny_model, "--data", tiny_rows, "--adapter-file", path, "--iters", 2)
    return path


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder; read it, never write to it."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 8), ("valid", 4), ("test", 4)):
        line = '{"text": "A layer scales the weights, and keeps the last token."}\n'
        (folder / f"{name}.jsonl").write_text(line * count)
    return folder
