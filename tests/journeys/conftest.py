"""The command line as a user has it: arguments in; exit code, stdout and stderr out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
