"""The command line as a user has it: arguments in; exit code, stdout and stderr out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_models
from small_models import REGISTRY

from mlxlora_core import cli
from mlxlora_core.model import loading
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins import Choice
from mlxlora_core.plugins.sections import Quantization, QuantizeConfig


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
        assert len(lines) == 1 and lines[0].startswith("mlxlora: "), self.err
        return lines[0]


@pytest.fixture
def mlxlora(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs ``mlxlora`` in this process, through the same function as the installed script."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = cli.execute([str(argument) for argument in arguments])
        return Outcome(int(code), *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Model]:
    """A function that opens a small model of a family, head and all in so many bits, or dense for 0."""
    made: dict[str, Path] = {}

    def opened(family: str, bits: int) -> Model:
        if family not in made:
            made[family] = small_models.write(tmp_path_factory.mktemp("family") / "model", family)
        affine = REGISTRY.find("quantizer", "affine")
        choice = Choice(affine, affine.spec.options(group_size=32, bits=bits or 4))
        quantization = Quantization(choice, QuantizeConfig(head=True)) if bits else None
        return loading.load(made[family], REGISTRY, quantization)

    return opened
