"""What comes from models, rows, packages, plugins and file names moves no cursor, and fits every encoding.

The suite takes two verbs for each encoding, in turn; ``MLXLORA_TEST_ALL=1`` takes all for all.
"""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from mlxlora_core.cli import streams

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
MLXLORA = [sys.executable, "-m", "mlxlora_core"]
#: a title for the window, a bell, a return, a C1 introducer, half a surrogate pair, an override of direction
EVIL = "a\x1b]0;owned\x07b\rc\x9b31md\x08e\x7ff"
ESCAPED = "a\\x1b]0;owned\\x07b\\rc\\x9b31md\\x08e\\x7ff"


def on_terminal(*arguments: object, cwd: Path, **variables: str) -> str:
    """What a verb shows on a terminal without bars, returns at the ends of lines taken away."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*MLXLORA, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        cwd=cwd,
        env={**os.environ, "MLXLORA_PLUGINS": "", "TERM": "dumb", **variables},
    )
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 120)[0]:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # its end, on Linux
            break
        if not part:
            break
        shown += part
    os.close(master)
    process.wait(60)
    return shown.decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def unsafe(text: str) -> list[str]:
    """The control characters of a text, but for ends of lines."""
    return [repr(c) for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cs")]


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0), 0xD800, 0xDFFF, 0x202E, 0x2066, 0x200F])
def test_what_moves_a_cursor_or_reorders_a_line_is_made_visible(code: int) -> None:
    shown = streams.visible(f"a{chr(code)}b")
    if chr(code) in "\n\t":
        assert shown == f"a{chr(code)}b"
    else:
        assert shown == "a" + chr(code).encode("unicode_escape").decode() + "b"


@pytest.mark.parametrize("text", ["é 漢字 かな 🙂", "👩\u200d🔬 किं\u200d", "\u3000\u00a0", "a\tb\n", "שלום"])
def test_what_people_write_passes(text: str) -> None:
    assert streams.visible(text) == text


PLUGIN = """
from mlxlora_core.api import DatasetBuilder, Row, Rows, Sampler, hookimpl, option
from dataclasses import dataclass

EVIL = {evil!r}

@dataclass(frozen=True)
class Options:
    k: int = option(3, help=EVIL)

def build(options):
    print(EVIL)
    import sys, warnings
    print(EVIL, file=sys.stderr)
    warnings.warn(EVIL)
    raise RuntimeError(EVIL)

@hookimpl
def mlxlora_samplers():
    return [Sampler(name="evil", summary=EVIL, options=Options, build=build)]

@hookimpl
def mlxlora_dataset_builders():
    return [DatasetBuilder(name="evil", summary=EVIL, options=Options, build=build, inputs=lambda o: {{}})]
"""


def test_no_control_character_of_a_plugin_reaches_a_terminal(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "evil.py").write_text(PLUGIN.format(evil=EVIL))
    for arguments in (
        ("options", "sampler", "evil"),
        ("components",),
        ("plugins",),
        ("data", "--builder", "evil", "--out", "out"),
        ("generate", "--model", tiny_model, "-p", "A", "--sampler", "evil"),
        ("components", "--json"),
        ("generate", "--model", tiny_model, "-p", "A", "--sampler", "evil", "--debug"),
    ):
        shown = on_terminal(*arguments, "-P", "./evil.py", cwd=tmp_path)
        assert unsafe(shown) == [], arguments
        assert "owned" in shown or arguments == ("plugins",), arguments


def test_a_plugin_that_fails_to_load_is_told_in_plain_characters(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"raise RuntimeError({EVIL!r})\n")
    assert unsafe(on_terminal("plugins", "-P", "./evil.py", cwd=tmp_path)) == []


def test_names_of_files_and_exceptions_of_packages_are_escaped(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    name = "a\x1b]0;owned\x07b"
    rows = shutil.copytree(tiny_rows, tmp_path / name)
    (rows / f"{name}.jsonl").write_text('{"text": "x"}\nno row\n')
    (tmp_path / "evil.py").write_text(f'"""x"""\nraise RuntimeError({EVIL!r})\n')
    package = ("--package", "evil", "--package", "json")
    for arguments in (
        ("data", "--builder", "jsonl", "--set", f"path={rows}", "--out", "out"),
        ("data", "--builder", "docstrings", *package, "--out", "out2"),
        ("evaluate", "--model", tiny_model, "--data", rows),
        ("evaluate", "--model", tmp_path / name / "none", "--data", rows),
        ("train", "--model", tiny_model, "--data", rows, "--adapter-file", f"{name}.npz", "--iters", "1"),
        ("generate", "--model", tiny_model, "-p", EVIL, "--adapter-file", name),
    ):
        assert unsafe(on_terminal(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))) == [], arguments


def test_the_bar_of_a_training_is_drawn_all_the_same(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    arguments = ("--model", tiny_model, "--data", tiny_rows, "--iters", "20", "--steps-per-report", "1")
    shown = on_terminal("train", *arguments, cwd=tmp_path, TERM="xterm")
    assert "\x1b[" in shown, "sequences of our own are not escaped"
    assert "step 20/20" in shown and "\\x1b" not in shown


def test_what_a_model_says_is_escaped_on_a_terminal_and_exact_in_a_pipe(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Its pieces for single bytes give control characters at a high temperature."""
    arguments = ["generate", "--model", tiny_model, "-p", "A", "-n", "60", "--temp", "9", "--seed", "3"]
    piped = subprocess.run([*MLXLORA, *map(str, arguments)], cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    said = piped.stdout.decode()
    assert len(unsafe(said)) > 3, "or this test shows nothing"
    shown = on_terminal(*arguments, cwd=tmp_path)
    assert unsafe(shown) == []
    assert streams.visible(said).splitlines()[0] in shown
    as_json = subprocess.run([*MLXLORA, *map(str, arguments), "--json"], cwd=tmp_path, stdout=subprocess.PIPE)
    assert json.loads(as_json.stdout)["text"] + "\n" == said
    assert unsafe(as_json.stdout.decode()) == []


# --- encodings ----------------------------------------------------------------

ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "utf-16"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
]


@pytest.mark.parametrize("variables", ENCODINGS, ids=str)
def test_another_encoding_is_no_error(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path, variables: dict[str, str]
) -> None:
    rows = shutil.copytree(tiny_rows, tmp_path / "é漢🙂")
    environment = {**os.environ, "MLXLORA_PLUGINS": "", **variables}

    def run(code: int, *arguments: object) -> bytes:
        done = subprocess.run(
            [*MLXLORA, *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, timeout=120
        )
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        return done.stdout

    answer = run(0, "generate", "--model", tiny_model, "-p", "é漢🙂", "-n", 5, "--json")
    encoding = variables.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    said = json.loads(answer.decode(encoding))
    assert said["prompt"] in ("é漢🙂", os.fsdecode("é漢🙂".encode())) or "PYTHONUTF8" in variables
    verbs = [
        (0, "generate", "--model", tiny_model, "-p", "A", "-n", 60, "--temp", 9),
        (0, "train", "--model", tiny_model, "--data", rows, "--iters", 1, "--adapter-file", rows / "é.npz"),
        (3, "evaluate", "--model", tiny_model, "--data", rows / "ü"),
        (0, "run", "--help"),
    ]
    number = ENCODINGS.index(variables) % len(verbs)
    for code, *verb in verbs if ALL else verbs[number : number + 1]:
        run(code, *verb)
