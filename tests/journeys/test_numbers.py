"""Every option and every key that takes a number, at the edges: it works, or is one line of exit code 2.

What takes a number is found out from the commands and the components: a new option is in here by itself.
"""

from __future__ import annotations

import io
import os
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest

from mlxlora_core import cli
from mlxlora_core.cli.verbs import commands
from mlxlora_core.options import explain
from mlxlora_core.plugins import KINDS, load
from mlxlora_core.plugins.sections import config_of
from mlxlora_core.runs.recipe import CHOICES, PLAIN, SECTIONS

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
EDGES = ("0", "-1", str(2**31), str(2**63), str(10**30), "nan", "inf", "-inf", "1e308", "1e-320", "x", "")
NO_NUMBER = re.compile("whole number|finite number|a number|valid integer|valid float")

#: an observer that interrupts a training as Ctrl-C does, once a step is made
STOP = """
import os, signal
from mlxlora_core.api import Observer, hookimpl

class Watcher:
    def event(self, event):
        if event["kind"] == "train":
            os.kill(os.getpid(), signal.SIGINT)

    def end(self, how):
        pass

@hookimpl
def mlxlora_observers():
    return [Observer(name="stop", summary="stops", start=lambda run, options: Watcher())]
"""

#: verb -> the shortest command line that does something; $NAME is filled in
COMMANDS = {
    "run": "$RECIPE --dry-run",
    "report": "$FOLDER/none",
    "convert": "--torch-path $CHECKPOINT --mlx-path $FOLDER/model -q --q-group-size 32 --overwrite",
    "data": "--builder jsonl --set path=$ROWS --out $FOLDER/made --overwrite",
    "train": "--model $MODEL --data $ROWS --adapter-file $FOLDER/a.npz --overwrite --iters 2 "
    "--max-seq-length 32 --steps-per-report 1 --test -p A --num-tokens 2",
    "evaluate": "--model $MODEL --data $ROWS",
    "generate": "--model $MODEL -p A -n 2",
    "chat": "--model $MODEL -n 2 --no-history",
    "fuse": "--model $MODEL --adapter-file $ADAPTER --save-path $FOLDER/fused --overwrite",
    "export": "--model $MODEL --to npz --out $FOLDER/out --overwrite",
    "plugins": "",
    "plugins new": "sampler mine",
    "plugins check": "$FOLDER",
    "plugins docs": "lora",
    "adapters": "$FOLDER",
    "components": "",
    "options": "sampler top-p",
    "doctor": "",
    "runs": "$FOLDER",
    "serve": "--model $MODEL --port 0",
}

RECIPE = """
run.folder = "$FOLDER/run"
model.mlx_path = "$MODEL"
data.use = "jsonl"
data.options.path = "$ROWS"
"""

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def places(tmp_path: Path, tiny_model: Path, tiny_checkpoint: Path, tiny_data: Path) -> dict[str, Path]:
    return {
        "$RECIPE": tmp_path / "recipe.toml",
        "$CHECKPOINT": tiny_checkpoint,
        "$FOLDER": tmp_path,
        "$MODEL": tiny_model,
        "$ROWS": tiny_data,
        "$ADAPTER": tmp_path / "none.npz",
    }


@pytest.fixture
def run(
    places: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    servers_stop_at_once: None,
) -> Run:
    """A verb with the shortest command line and something behind it: its exit code and lines of stderr."""
    monkeypatch.setenv("MLXLORA_PLUGINS", "")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))  # of chat
    monkeypatch.chdir(places["$FOLDER"])  # an option that takes a path gets a relative one
    places["$RECIPE"].write_text(filled(RECIPE, places))
    stop = places["$FOLDER"] / "stop.py"
    stop.write_text(STOP)

    def call(verb: str, *more: str, stops: bool = False, command: str | None = None) -> tuple[int, list[str]]:
        stopping = ["-P", str(stop), "--observer", "stop"] if stops else []
        capfd.readouterr()
        begin = filled(COMMANDS[verb] if command is None else command, places)
        code = cli.execute([*verb.split(), *begin.split(), *stopping, *more])
        return code, capfd.readouterr().err.splitlines()

    return call


def values(number: int) -> tuple[str, ...]:
    """The edges that are tried for an option, by its number: a quarter of them in turn, or by night all."""
    return EDGES if ALL else EDGES[number % 4 :: 4]


def filled(text: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        text = text.replace(name, str(path))
    return text


def options(verb: str) -> list[str]:
    """The options of a verb that take a value, as they are written."""
    return [p.opts[0] for p in commands()[verb].params if isinstance(p, click.Option) and not p.is_flag]


ALL_OPTIONS = [(verb, option) for verb in commands() for option in options(verb)]


def check(code: int, lines: list[str], what: str) -> None:
    """Assert that it has worked, or is one line of exit code 2."""
    if "adapter-weight" in what and code == 4:  # a good weight, of an adapter that is not there
        assert "none.npz: there is no such file" in lines[-1], what
        return
    if "learning-rate" in what and code == 7:  # which is what it does
        assert "is not finite" in lines[-1], what
        return
    assert code in (0, 2), f"{what}: {code} {lines[-1:]}"
    if code == 2:
        assert len(lines) == 1 and len(lines[0]) < 2000 and lines[0].startswith("mlxlora: "), (
            f"{what}: {lines}"
        )


def test_every_verb_has_a_command_line_here() -> None:
    assert COMMANDS.keys() == commands().keys()


def test_what_takes_a_number_is_found(run: Run) -> None:
    wanted = {
        ("train", "--iters"), ("train", "--learning-rate"), ("train", "--seed"), ("train", "--lora-layers"),
        ("generate", "--temp"), ("generate", "--num-tokens"), ("evaluate", "--test-batches"),
        ("convert", "--q-bits"), ("convert", "--q-group-size"),
    }  # fmt: skip
    assert {pair for pair in wanted if takes_number(run, *pair)} == wanted
    assert not takes_number(run, "generate", "--prompt")


def takes_number(run: Run, verb: str, option: str) -> bool:
    code, lines = run(verb, option, "x")
    return code == 2 and NO_NUMBER.search(lines[-1]) is not None


@pytest.mark.parametrize(("verb", "option"), ALL_OPTIONS)
def test_an_option_at_the_edges(run: Run, verb: str, option: str) -> None:
    if not takes_number(run, verb, option):
        return
    stops = option == "--iters"  # works by beginning
    for value in values(ALL_OPTIONS.index((verb, option))):
        code, lines = run(verb, option, value, stops=stops)
        if stops and code == 130:
            assert lines[-1].startswith("mlxlora: interrupted; step 1 is saved")
        else:
            check(code, lines, f"{verb} {option} {value}")


# --- components ---------------------------------------------------------------


def numbers(config: type[Any]) -> Iterator[str]:
    """The options of a dataclass that are numbers, or lists of them."""
    for known in explain(config):
        kinds = {known.type, *get_args(known.type)} if not isinstance(known.type, type) else {known.type}
        if isinstance(known.type, types.UnionType):
            kinds |= set(get_args(known.type))
        if kinds & {int, float}:
            yield known.name


#: kind -> the verb that uses one, the option that names it, and the section of its options
USERS = {
    "adapter": ("train", "--adapter", "adapter"),
    "quantizer": ("convert", "--quantize", "quantize"),
    "sampler": ("generate", "--sampler", "sampler"),
    "builder": ("data", "--builder", "data"),
    "exporter": ("export", "--to", "export"),
    "observer": ("train", "--observer", "observe"),
    "evaluator": ("evaluate", "--evaluator", "evaluator"),
}

COMPONENT_OPTIONS = [
    (component.kind, component.spec.name, name)
    for component in load(environ={"MLXLORA_PLUGINS": ""}).components
    if component.kind in USERS
    for config in (component.spec.options, config_of(component.kind))
    for name in numbers(config)
]


def test_components_with_numbers_are_found() -> None:
    wanted = {
        ("adapter", "lora", "rank"),
        ("sampler", "top-k", "k"),
        ("builder", "jsonl", "write_batch_size"),
    }
    assert wanted <= set(COMPONENT_OPTIONS)
    assert {"adapter", "quantizer", "sampler", "builder", "exporter", "observer", "evaluator"} <= KINDS.keys()


@pytest.mark.parametrize(("kind", "name", "option"), COMPONENT_OPTIONS)
def test_an_option_of_a_component_at_the_edges(run: Run, kind: str, name: str, option: str) -> None:
    verb, flag, section = USERS[kind]
    packages = "--package pluggy --out $FOLDER/made --overwrite"  # where a path is no option
    command = packages if name == "docstrings" else None
    for value in values(COMPONENT_OPTIONS.index((kind, name, option))):
        code, lines = run(verb, flag, name, "--set", f"{section}.{option}={value}", command=command)
        check(code, lines, f"{name} {option}={value}")


# --- recipes ------------------------------------------------------------------

RECIPE_KEYS = [(section, name) for section in PLAIN for name in numbers(PLAIN[section])] + [
    (section, name) for section in CHOICES for name in numbers(config_of(CHOICES[section][0]))
]


def test_recipe_keys_are_found() -> None:
    assert {("train", "iters"), ("run", "seed"), ("data", "test_set_size")} <= set(RECIPE_KEYS)
    assert {section for section, _ in RECIPE_KEYS} <= set(SECTIONS)


@pytest.mark.parametrize(("section", "key"), RECIPE_KEYS)
def test_a_key_of_a_recipe_at_the_edges(run: Run, places: dict[str, Path], section: str, key: str) -> None:
    recipe = places["$RECIPE"]
    use = 'quantize.use = "affine"\n' if section == "quantize" else ""
    for value in values(RECIPE_KEYS.index((section, key))):
        written = value if value not in ("", "x") else f'"{value}"'
        recipe.write_text(f"{filled(RECIPE, places)}{use}{section}.{key} = {written}\n")
        check(*run("run"), f"{section}.{key} = {written}")
        recipe.write_text(filled(RECIPE, places) + use)
        check(*run("run", "--set", f"{section}.{key}={value}"), f"--set {section}.{key}={value}")
