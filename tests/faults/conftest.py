"""The command line, and the model folder and data that hostile files are put into."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlxlora_core import cli


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; more lines, or a traceback, fail the test."""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("mlxlora: ") and lines[0].isprintable(), self.err
        return lines[0]


Command = Callable[..., Outcome]


@pytest.fixture
def mlxlora(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs ``mlxlora`` in this process, through the same function as the installed script."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = cli.execute([str(argument) for argument in arguments])
        return Outcome(int(code), *capfd.readouterr())

    return run


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that code in a hostile file would make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code in a file ran"


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A model folder; read it, never write to it."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    arguments = ["convert", "--torch-path", str(tiny_checkpoint), "--mlx-path", str(folder)]
    assert cli.execute(arguments) == 0
    return folder


@pytest.fixture
def model(converted: Path, tmp_path: Path) -> Path:
    """A model folder of one's own, to damage."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def source(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A checkpoint of one's own, to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
