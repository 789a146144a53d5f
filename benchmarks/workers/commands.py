"""Command lines that are measured from start to end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        group: what it does; commands of a group are compared.
        tool: whose it is.
        arguments: the program and its arguments.
        target: a folder that it makes, which is removed after each run.
    """

    group: str
    tool: str
    arguments: Sequence[str]
    target: Path | None = None

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.group}, {self.tool}"


def program(python: str, name: str) -> str:
    """A script beside the interpreter of its environment."""
    return str(Path(python).with_name(name))


def convert(source: Path, target: Path, dtype: str, more: Sequence[str]) -> Command:
    """mlxlora's conversion of a Meta checkpoint."""
    flags = ["--torch-path", str(source), "--mlx-path", str(target), "--dtype", dtype, *more]
    return Command("convert", "mlxlora", [program(sys.executable, "mlxlora"), "convert", *flags], target)


def conversions(peers: str, meta: Path, hugging_face: Path) -> list[Command]:
    """Dense and 4-bit conversions of the same float16 weights, by mlxlora and by mlx-lm."""
    found = []
    for group, flags in (("float16", []), ("4 bits", ["-q"])):
        ours, theirs = meta.parent / "converted", meta.parent / "converted-by-mlx-lm"
        command = convert(meta, ours, "float16", flags)
        found.append(Command(group, "mlxlora", command.arguments, ours))
        arguments = [program(peers, "mlx_lm.convert"), "--hf-path", str(hugging_face)]
        arguments += ["--mlx-path", str(theirs), "--dtype", "float16", *flags]
        found.append(Command(group, "mlx-lm", arguments, theirs))
    return found


def starts(peers: str, model: Path, hugging_face: Path) -> list[Command]:
    """What a user waits for before anything happens."""
    mlxlora = program(sys.executable, "mlxlora")
    one_token = ["--prompt", "a", "--temp", "0"]
    return [
        Command("help", "mlxlora", [mlxlora, "--help"]),
        Command("help", "python -c pass", [sys.executable, "-c", "pass"]),
        Command("help", "mlx-lm", [program(peers, "mlx_lm.lora"), "--help"]),
        Command(
            "one token",
            "mlxlora",
            [mlxlora, "generate", "--model", str(model), "--num-tokens", "1", *one_token],
        ),
        Command(
            "one token",
            "mlx-lm",
            [
                program(peers, "mlx_lm.generate"),
                "--model",
                str(hugging_face),
                "--max-tokens",
                "1",
                *one_token,
            ],
        ),
    ]


def has_modules(python: str, names: Sequence[str]) -> bool:
    """Whether an interpreter finds modules; none is imported."""
    code = "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    return subprocess.run([python, "-c", code, *names], capture_output=True).returncode == 0


def check(command: Command) -> None:
    """Run a command that must work; it is not measured and what it makes stays."""
    run_command(command, os.environ, keep=True)


def run_command(command: Command, environment: Mapping[str, str], keep: bool = False) -> tuple[float, int]:
    """Seconds and peak resident memory in bytes of a command.

    Raises:
        click.ClickException: it failed; with the last line that it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            command.arguments, env=dict(environment), stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().strip().splitlines()
    if process.returncode:
        raise click.ClickException(f"{command.name} failed: {lines[-1] if lines else process.returncode}")
    if command.target is not None and not keep:
        shutil.rmtree(command.target)
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
