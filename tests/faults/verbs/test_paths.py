"""Every option of every verb that takes a path, at paths that are odd: it works, or is one short line.

The options are read off the commands and off what plugins declare, so that a new one joins by itself.
The suite takes a third of the paths for each, in turn; ``MLXLORA_TEST_ALL=1`` takes all for all.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from mlxlora_core import cli
from mlxlora_core.cli.declare import PathType
from mlxlora_core.cli.verbs import commands
from mlxlora_core.errors import ExitCode
from mlxlora_core.options import explain
from mlxlora_core.plugins import load
from mlxlora_core.plugins.sections import config_of
from mlxlora_core.runs.recipe import CHOICES, PLAIN

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
SECONDS = 120  # far longer than any of these takes
KNOWN = set(ExitCode) - {ExitCode.DEFECT}

RECIPE = """
[model]
torch_path = "{checkpoint}"
dtype = "float32"
[data]
use = "jsonl"
options = {{ path = "{rows}" }}
[adapter]
use = "lora"
layers = 1
options = {{ rank = 1 }}
[train]
iters = 1
batch_size = 1
[sampler]
use = "greedy"
"""


@dataclass(frozen=True)
class Base:
    """What a verb that works is given."""

    checkpoint: Path
    model: Path
    adapter: Path
    rows: Path


@pytest.fixture(scope="session")
def base(tiny_checkpoint: Path, tiny_model: Path, tiny_adapter: Path, tiny_rows: Path) -> Base:
    """Read it, never write to it."""
    return Base(tiny_checkpoint, tiny_model, tiny_adapter, tiny_rows)


# --- the verbs ----------------------------------------------------------------


def convert(base: Base) -> dict[str, Any]:
    return {"source": base.checkpoint, "mlx_path": "out"}


def data(base: Base) -> dict[str, Any]:
    return {"builder": "jsonl", "out": "out", "sets": f"path={base.rows}"}


def train(base: Base) -> dict[str, Any]:
    few = {"iters": 1, "batch_size": 1, "lora_layers": 1}
    return {"model": base.model, "data": base.rows, "adapter_file": "a.safetensors", **few}


def evaluate(base: Base) -> dict[str, Any]:
    return {"model": base.model, "data": base.rows}


def generate(base: Base) -> dict[str, Any]:
    return {"model": base.model, "prompt": "A", "num_tokens": 1}


def chat(base: Base) -> dict[str, Any]:
    return {"model": base.model, "num_tokens": 1, "system": "S"}


def fuse(base: Base) -> dict[str, Any]:
    return {"model": base.model, "adapter_file": base.adapter, "save_path": "out"}


def export(base: Base) -> dict[str, Any]:
    return {"to": "npz", "model": base.model, "out": "out"}


def adapters(base: Base) -> dict[str, Any]:
    return {"paths": base.adapter, "models": base.model}


def plugins_new(base: Base) -> dict[str, Any]:
    return {"kind": "sampler", "name": "mine", "folder": "out"}


def plugins_check(base: Base) -> dict[str, Any]:
    return {}


def plugins_docs(base: Base) -> dict[str, Any]:
    return {"name": "lora", "output": "out.md"}


def report(base: Base) -> dict[str, Any]:
    return {}


def runs(base: Base) -> dict[str, Any]:
    return {"folders": "."}


def serve(base: Base) -> dict[str, Any]:
    return {"model": base.model, "port": 0}


def run(base: Base) -> dict[str, Any]:
    path = Path("recipe.toml")
    path.write_text(RECIPE.format(checkpoint=base.checkpoint, rows=base.rows))
    return {"recipe": path}


WORKING: dict[str, Callable[[Base], dict[str, Any]]] = {
    verb.__name__.replace("_", " "): verb
    for verb in (
        convert,
        data,
        train,
        evaluate,
        generate,
        chat,
        fuse,
        export,
        adapters,
        plugins_new,
        plugins_check,
        plugins_docs,
        report,
        run,
        runs,
        serve,
    )
}


def command(verb: str) -> click.Command:
    """The command of a verb."""
    return commands()[verb]


def path_options() -> list[tuple[str, str]]:
    """(verb, parameter) of each that takes a path."""
    return [
        (verb, param.name)
        for verb, known in commands().items()
        for param in known.params
        if isinstance(param.type, PathType) and param.name is not None
    ]


def recipe_options() -> list[str]:
    """``section.key`` of each value of a recipe that is a path."""
    plain = [(section, kind) for section, kind in PLAIN.items()]
    registry = load()
    own = [
        (section, kind)
        for section, (part, _, _) in CHOICES.items()
        for kind in (config_of(part), *(c.spec.options for c in registry.of(part) if c.spec.name == "jsonl"))
    ]
    paths = {
        f"{section}.{option.name}"
        for section, kind in (*plain, *own)
        for option in explain(kind)
        if "path" in option.type_name
    }
    return sorted({*paths, "run.folder"})


def line(verb: str, given: dict[str, Any]) -> list[str]:
    """The command line with these values."""
    written = verb.split()
    for param in command(verb).params:
        if param.name in given and isinstance(param, click.Option):
            written += [param.opts[0], str(given[param.name])]
    written += [
        str(given[p.name]) for p in command(verb).params if isinstance(p, click.Argument) and p.name in given
    ]
    return written


# --- the paths ----------------------------------------------------------------


def fifo(name: str) -> str:
    os.mkfifo(name)
    return name


def sock(name: str) -> str:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(name)
    return name


def link(name: str, target: str) -> str:
    os.symlink(target, name)
    return name


def file(name: str) -> str:
    Path(name).write_text("precious")
    return name


def blank(name: str) -> str:
    Path(name).touch()
    return name


def folder(name: str) -> str:
    Path(name).mkdir()
    Path(name, "notes.txt").write_text("precious")
    return name


def empty_folder(name: str) -> str:
    Path(name).mkdir()
    return name


def closed(name: str) -> str:
    Path(f"closed{name}").mkdir(0o000)
    return f"closed{name}/below/a.safetensors"


PATHS: dict[str, Callable[[str], str]] = {
    "root": lambda end: "/",
    "here": lambda end: ".",
    "above": lambda end: "..",
    "empty": lambda end: "",
    "space": lambda end: f" {end}",
    "zero byte": lambda end: f"a\0b{end}",
    "loop": lambda end: link(f"loop{end}", f"loop{end}"),
    "loop in the middle": lambda end: link(f"l{end}", f"l{end}") + f"/below{end}",
    "long name": lambda end: "n" * 300 + end,
    "name at the limit": lambda end: "n" * (255 - len(end)) + end,
    "long path": lambda end: "/".join(["folder"] * 800) + end,
    "no UTF-8": lambda end: os.fsdecode(b"a\xff") + end,
    "control": lambda end: f"a\n\x1b[2Jb{end}",
    "pipe": lambda end: fifo(f"pipe{end}"),
    "link to a pipe": lambda end: link(f"to{end}", fifo(f"pipe{end}")),
    "below a pipe": lambda end: f"{fifo(f'pipe{end}')}/a{end}",
    "null": lambda end: link(f"null{end}", "/dev/null"),
    "full": lambda end: link(f"full{end}", "/dev/full"),
    "zero": lambda end: link(f"zero{end}", "/dev/zero"),
    "device": lambda end: "/dev/null",
    "socket": lambda end: sock(f"socket{end}"),
    "file": lambda end: file(f"file{end}"),
    "empty file": lambda end: blank(f"blank{end}"),
    "below a file": lambda end: f"{file(f'file{end}')}/a{end}",
    "file with a slash": lambda end: f"{file(f'file{end}')}/",
    "folder": lambda end: folder(f"folder{end}"),
    "empty folder": lambda end: empty_folder(f"folder{end}"),
    "dangling": lambda end: link(f"dangling{end}", "nowhere/at/all"),
    "dangling beside": lambda end: link(f"dangling{end}", "nowhere"),
    "no home": lambda end: f"~nobody-of-that-name/a{end}",
    "closed": closed,
    "system": lambda end: f"/proc/self/a{end}",
    "option": lambda end: f"-x{end}",
}


def chosen(number: int) -> list[tuple[str, Callable[[str], str]]]:
    """The paths that are tried for an option, by its number."""
    return list(PATHS.items())[None if ALL else number % 3 :: 1 if ALL else 3]


class Hung(BaseException):
    """A verb that did not come back."""


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Ends what waits for a pipe for ever."""

    def stop(signum: int, frame: object) -> None:
        raise Hung(what)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def faults(what: str, arguments: list[str], capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What is wrong with how a command line ended."""
    capfd.readouterr()
    with limited(what):
        code = cli.execute(arguments)
    err = capfd.readouterr().err
    last = err.strip().rsplit("\n", 1)[-1]
    if code not in KNOWN:
        return [f"{what}: exit code {code}: {last[:200]}"]
    if code and (not last.startswith("mlxlora: ") or len(last) > 2000 or not last.isprintable()):
        return [f"{what}: {len(last)} letters: {last[:200]}"]
    return []


def precious(place: Path) -> None:
    """Fail where a file that was there has gone or has changed."""
    for path in (*place.glob("file*"), *place.glob("folder*/notes.txt")):
        if path.is_file() and path.stat().st_size:
            assert path.read_text() == "precious", path


@pytest.mark.parametrize(("verb", "option"), path_options())
def test_each_option_of_each_verb_at_each_path(
    verb: str,
    option: str,
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    servers_stop_at_once: None,
) -> None:
    found = []
    for name, make in chosen(path_options().index((verb, option))):
        place = tmp_path / name
        place.mkdir()
        monkeypatch.chdir(place)
        working = WORKING[verb](base)
        if (verb, option) == ("serve", "run"):
            del working["model"]  # a run folder says which
        given = working | {option: make(".safetensors" if "adapter" in option else "")}
        found += faults(name, line(verb, given), capfd)
        precious(place)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("key", recipe_options())
def test_each_path_in_a_recipe_at_each_path(
    key: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = []
    for name, make in chosen(recipe_options().index(key)):
        place = tmp_path / name
        place.mkdir()
        monkeypatch.chdir(place)
        arguments = line("run", WORKING["run"](base))
        found += faults(name, [*arguments, "--set", f"{key}={make('')}"], capfd)
        precious(place)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", PATHS)
def test_a_plugin_file_at_each_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not faults(name, ["plugins", "-P", f"./{PATHS[name]('.py')}"], capfd)


def test_each_verb_that_takes_a_path_is_tried() -> None:
    assert {name for number in range(3) for name, _ in chosen(number)} == PATHS.keys()
    assert {verb for verb, _ in path_options()} == WORKING.keys()
    assert "data.path" in recipe_options() and "model.torch_path" in recipe_options()


def test_a_training_whose_paths_are_no_utf_8_is_taken_up_and_shown(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, rows, adapter = (os.fsdecode(name) for name in (b"m\xff", b"d\xfe", b"a\xfd.safetensors"))
    shutil.copytree(base.model, model)
    shutil.copytree(base.rows, rows)
    given = WORKING["train"](base) | {"model": model, "data": rows, "adapter_file": adapter}
    assert cli.execute(line("train", given)) == 0
    assert cli.execute([*line("train", given), "--overwrite"]) == 0
    assert cli.execute([*line("train", given), "--iters", "2", "--resume"]) == 0
    capfd.readouterr()
    assert cli.execute(["report", os.fsdecode(b"a\xfd.checkpoints")]) == 0
    assert "warning" not in capfd.readouterr().err
