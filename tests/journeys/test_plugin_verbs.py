"""Verbs that plugins bring: found by their name, one line for whatever goes wrong, and never in the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlxlora_core import cli

Capfd = pytest.CaptureFixture[str]

PLUGIN = """
import os, signal, time
import click
from mlxlora_core.api import Command, DataError, hookimpl

ENDS = {
    "well": lambda: 7,  # what a function gives back is no exit code
    "exit": lambda: click.get_current_context().exit(3),
    "sys": lambda: (_ for _ in ()).throw(SystemExit(3)),
    "fault": lambda: 1 / 0,
    "click": lambda: (_ for _ in ()).throw(click.ClickException("there is no such server")),
    "bad": lambda: (_ for _ in ()).throw(click.BadParameter("no such end")),
    "data": lambda: (_ for _ in ()).throw(DataError("there is no row", fix="write one")),
    "memory": lambda: (_ for _ in ()).throw(MemoryError()),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(60),
}


@click.command()
@click.option("--end", default="well", help="How to end.")
@click.argument("words", nargs=-1)
def say(end, words):
    \"\"\"Say some words.\"\"\"
    click.echo(" ".join(words))
    ENDS[end]()


@hookimpl
def mlxlora_commands():
    made = {"say": lambda: say, "train": lambda: say, "three": lambda: 3,
            "unfit": lambda: click.Command("unfit", callback=lambda word: None)}
    return [Command(name=name, summary="s", command=make) for name, make in made.items()]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "words.py").write_text(PLUGIN)
    return tmp_path / "words.py"


def ended(capfd: Capfd, *words: object) -> tuple[int, str, list[str]]:
    capfd.readouterr()
    code = cli.execute([str(word) for word in words])
    told = capfd.readouterr()
    return int(code), told.out, told.err.splitlines()


def test_a_verb_of_a_plugin_is_called_by_its_name(capfd: Capfd, plugin: Path) -> None:
    assert ended(capfd, "say", "a", "b", "-P", plugin) == (0, "a b\n", [])
    assert ended(capfd, f"--plugin={plugin}")[0] == 2
    assert ended(capfd, "say", f"--plugin={plugin}", "--", "-P", "--debug") == (0, "-P --debug\n", [])
    assert ended(capfd, "words:say", "-P", plugin, "c") == (0, "c\n", [])
    code, out, _ = ended(capfd, "say", "--help", "-P", plugin)
    assert code == 0 and out.startswith("Usage: mlxlora say [OPTIONS] [WORDS]...\n\n  Say some words.")


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        ("exit", 3, ""),
        ("sys", 8, "plugin words (file) failed: it called sys.exit(3)"),
        ("fault", 8, "plugin words (file) failed: ZeroDivisionError: division by zero"),
        ("click", 2, "mlxlora: there is no such server"),
        ("bad", 2, "mlxlora: Invalid value: no such end. See: mlxlora say --help"),
        ("data", 3, "mlxlora: there is no row. Fix: write one"),
        ("memory", 6, "memory"),
    ],
)
def test_whatever_goes_wrong_is_one_line(capfd: Capfd, plugin: Path, end: str, code: int, line: str) -> None:
    got, out, err = ended(capfd, "say", "hello", "--end", end, "-P", plugin)
    assert (got, out) == (code, "hello\n")
    assert len(err) == bool(line) and line in "".join(err)
    if code == 8:
        assert any(
            "Traceback" in one for one in ended(capfd, "say", "--end", end, "-P", plugin, "--debug")[2]
        )


def test_a_signal_ends_it_as_any_verb(plugin: Path) -> None:
    line = [sys.executable, "-m", "mlxlora_core", "say", "--end", "interrupt", "-P", str(plugin)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "mlxlora: interrupted\n")


def test_a_wrong_line_names_the_help_of_the_verb(capfd: Capfd, plugin: Path) -> None:
    code, out, err = ended(capfd, "say", "--ned", "x", "-P", plugin)
    assert (code, out) == (2, "") and len(err) == 1
    assert err[0].startswith("mlxlora: No such option '--ned'") and err[0].endswith("See: mlxlora say --help")


def test_what_is_no_command_is_named_with_its_plugin(capfd: Capfd, plugin: Path) -> None:
    code, _, err = ended(capfd, "three", "-P", plugin)
    assert (code, err) == (8, ["mlxlora: command words:three: command gives int, wanted Command"])
    code, _, err = ended(capfd, "unfit", "-P", plugin)
    assert (
        code == 8 and len(err) == 1 and "words (file) failed in the command words:unfit: TypeError" in err[0]
    )


def test_a_verb_of_mlxlora_cannot_be_taken_over(capfd: Capfd, plugin: Path) -> None:
    code, out, _ = ended(capfd, "train", "--help", "-P", plugin)
    assert code == 0 and "Train an adapter on a dataset folder." in out
    assert ended(capfd, "words:train", "a", "-P", plugin) == (0, "a\n", [])


def test_two_plugins_with_one_verb_are_both_named(capfd: Capfd, plugin: Path) -> None:
    other = plugin.with_name("others.py")
    other.write_text(PLUGIN)
    code, out, err = ended(capfd, "say", "-P", plugin, "-P", other)
    assert (code, out) == (8, "") and len(err) == 1
    assert "words:say" in err[0] and "others:say" in err[0] and "Fix: write " in err[0]
    assert ended(capfd, "others:say", "a", "-P", plugin, "-P", other) == (0, "a\n", [])


def test_a_verb_that_nobody_has_is_told_with_the_nearest(capfd: Capfd, plugin: Path) -> None:
    wanted = "mlxlora: No such command '{}'. Did you mean '{}'? See: mlxlora --help"
    assert ended(capfd, "trian") == (2, "", [wanted.format("trian", "train")])
    assert ended(capfd, "trian", "--help") == (2, "", [wanted.format("trian", "train")])
    assert ended(capfd, "sya", "-P", plugin) == (2, "", [wanted.format("sya", "say")])


def test_a_broken_plugin_is_told_when_a_verb_is_missed(capfd: Capfd, plugin: Path) -> None:
    plugin.write_text("import nothing_of_that_name")
    code, _, err = ended(capfd, "say", "-P", plugin)
    assert code == 8 and "nothing_of_that_name" in err[-1]


@pytest.mark.parametrize("line", ["--help", "train --help", "--version"])
def test_help_imports_no_plugin(line: str) -> None:
    program = (
        "import sys; from mlxlora_core import cli; cli.execute(sys.argv[1:]); "
        "print([name for name in sys.modules if name.startswith('mlxlora_') and name[:12] != 'mlxlora_core'])"
    )
    done = subprocess.run([sys.executable, "-c", program, *line.split()], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
