"""Plugins that end the process, or change what surrounds them: named and put back, at import and at work."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from warm import Done, Warm

from mlxlora_core import cli

PLUGIN = """
import atexit, builtins, gc, locale, os, posix, resource, signal, sys, threading, time, warnings
from mlxlora_core.api import Sampler, hookimpl

def act():
    {body}

if {when!r} == "import":
    act()

def transform(logits, tokens):
    if {when!r} == "transform":
        act()
    return logits

def build(options):
    if {when!r} == "build":
        act()
    return transform

@hookimpl
def mlxlora_samplers():
    return [Sampler(name="odd", summary="odd", build=build)]
"""

WHEN = ("import", "build", "transform")


Generate = Callable[..., Done]


@pytest.fixture
def generate(tmp_path: Path, tiny_model: Path, warm: Warm) -> Generate:
    """Makes a text that the odd sampler has a part in, in a process of its own."""

    def run(body: str, when: str, start: Callable[..., Done] = warm.run) -> Done:
        (tmp_path / "odd.py").write_text(PLUGIN.format(body=body, when=when))
        plugin = ("-P", "./odd.py", "--sampler", "odd")
        return start("generate", *plugin, "--model", tiny_model, "-p", "A", "-n", 3, cwd=tmp_path)

    return run


#: mlxlora, with less patience at the end
IMPATIENT = "from mlxlora_core import cli; cli.GRACE_SECONDS = 0.5; cli.main()"


def from_the_start(*arguments: object, cwd: Path) -> Done:
    """As :meth:`Warm.run`, with an interpreter of its own, whose end is the real one too."""
    return subprocess.run(
        [sys.executable, "-c", IMPATIENT, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, errors="replace", timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def in_turn(cases: dict[str, str]) -> list[Any]:
    """Each case at one of the three times, in turn."""
    return [
        pytest.param(*case, when, id=f"{case[0]} {when}")
        for case, when in zip(cases.items(), cycle(WHEN), strict=False)
    ]


ENDINGS = {
    "os._exit(0)": "it called os._exit(0)",
    "posix._exit(0)": "it called os._exit(0)",
    "from os import _exit; _exit(0)": "it called os._exit(0)",
    "os.execv('/bin/true', ['true'])": "it called os.execv('/bin/true', ['true'])",
    "os.execlp('true', 'true')": "it called os.execv",
    "os.abort()": "it called os.abort()",
    "os.fork() and os._exit(0)": "it called os._exit(0)",
    "sys.exit(0)": "it called sys.exit(0)",
    "raise SystemExit": "it called sys.exit(None)",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise GeneratorExit": "GeneratorExit",
    "raise StopIteration": "StopIteration",
    "import click; raise click.exceptions.Exit(0)": "Exit: 0",
    "import asyncio; raise asyncio.CancelledError": "CancelledError",
}


@pytest.mark.parametrize(("body", "words", "when"), in_turn(ENDINGS))
def test_what_would_end_the_process_is_8_and_names_the_plugin(
    generate: Generate, body: str, words: str, when: str
) -> None:
    done = generate(body, when)
    assert done.returncode == 8, (done.returncode, done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mlxlora: ")]
    assert line == done.stderr.splitlines()[-1], "an error is the last line, and one"
    assert "plugin odd (file) failed" in line and words in line and done.stdout == ""


CHANGES = {
    "os.chdir('/')": "the working folder",
    "os.umask(0o777)": "the umask",
    "sys.setrecursionlimit(60)": "the recursion limit",
    "signal.signal(signal.SIGINT, signal.SIG_IGN)": "the handler of SIGINT",
    "signal.signal(signal.SIGTERM, lambda *_: None)": "the handler of SIGTERM",
    "signal.signal(signal.SIGPIPE, signal.SIG_DFL)": "the handler of SIGPIPE",
    "signal.alarm(1)": "the real timer",
    "locale.setlocale(locale.LC_ALL, 'C')": "the locale",
    "warnings.simplefilter('error')": "warning filters",
    "sys.path.clear()": "sys.path",
    "sys.path.insert(0, '/nowhere')": "sys.path",
    "sys.argv.clear()": "sys.argv",
    "sys.stderr = None": "sys.stderr",
    "sys.modules.clear()": "sys.modules",
    "builtins.open = None": "builtins.open",
    "gc.disable()": "garbage collection",
    "os.environ.clear()": "environment variables",
    "os.closerange(0, 3)": "stdin, stdout, stderr",
    "os.dup2(os.open(os.devnull, os.O_RDWR), 1)": "stdout",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))": (
        "RLIMIT_NOFILE"
    ),
    "import numpy; numpy.seterr(all='raise')": "numpy's error handling",
}


@pytest.mark.parametrize(("body", "what", "when"), in_turn(CHANGES))
def test_what_is_changed_is_named_and_put_back(generate: Generate, body: str, what: str, when: str) -> None:
    done = generate(body, when)
    assert done.returncode == 0 and done.stdout.strip(), (done.returncode, done.stderr)
    assert f"has changed {what}, which is put back" in done.stderr
    assert done.stderr.count("put back") == 1 and "odd" in done.stderr


@pytest.mark.parametrize("when", WHEN)
def test_descriptors_that_are_closed_beyond_recall_are_8(generate: Generate, when: str) -> None:
    body = "os.closerange(0, os.sysconf('SC_OPEN_MAX'))"
    assert generate(body, when).returncode == 8


@pytest.mark.parametrize("when", WHEN)
def test_what_it_prints_is_no_result(generate: Generate, when: str) -> None:
    done = generate("print('from the plugin')", when)
    assert done.returncode == 0
    assert "from the plugin" in done.stderr and "from the plugin" not in done.stdout


@pytest.mark.parametrize("when", WHEN)
def test_a_child_that_it_forks_does_not_answer_too(generate: Generate, when: str) -> None:
    plain = generate("pass", when)
    done = generate("os.fork()", when)
    assert (done.returncode, done.stdout) == (0, plain.stdout)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("threading.Thread(target=lambda: time.sleep(60), name='lasting').start()", "thread lasting of "),
        ("atexit.register(time.sleep, 60)", "an exit function"),
    ],
)
def test_what_goes_on_at_the_end_is_left_behind(generate: Generate, body: str, words: str) -> None:
    done = generate(body, "build", from_the_start)  # its time is limited
    assert done.returncode == 0 and done.stdout
    assert f"warning: still at work, and left behind: {words}" in done.stderr


def test_an_exit_function_does_not_change_the_exit_code(generate: Generate) -> None:
    done = generate("atexit.register(lambda: os._exit(3))", "import", from_the_start)
    assert done.returncode == 0 and "Traceback" not in done.stderr


MEMORY = [
    "MemoryError()",
    'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 9 bytes")',
    "OSError(28, 'No space left on device')",
]


@pytest.mark.parametrize(("when", "fault"), list(zip(WHEN, MEMORY, strict=True)), ids=WHEN)
def test_memory_that_runs_out_in_a_plugin_is_6(generate: Generate, fault: str, when: str) -> None:
    done = generate(f"raise {fault}", when)
    assert done.returncode == 6, done.stderr


# --- a plugin that fails as it is imported takes nothing along ------------------


def installed(folder: Path, code: str) -> Path:
    """A site of its own with a plugin in it."""
    site = folder / "site"
    (site / "p-1.dist-info").mkdir(parents=True)
    (site / "p-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: p\nVersion: 1\n")
    (site / "p-1.dist-info" / "entry_points.txt").write_text("[mlxlora]\np = broken_plugin\n")
    (site / "broken_plugin.py").write_text(f"{code}\nraise RuntimeError('broken')\n")
    return site


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.chdir('/')",
        "import os; os.umask(0o777)",
        "import os; os.environ['MLXLORA_THREADS'] = 'many'",
        "import sys; sys.setrecursionlimit(60)",
        "import sys; sys.stdout = sys.stderr = None",
        "import os; os.closerange(0, 3)",
        "import sys; sys.path.clear()",
    ],
)
def test_one_that_fails_takes_nothing_along(tmp_path: Path, tiny_rows: Path, code: str) -> None:
    site = installed(tmp_path, code)
    command = ["env", "-u", "MLXLORA_PLUGINS", f"PYTHONPATH={site}", sys.executable, "-m", "mlxlora_core"]
    arguments = ["data", "--builder", "jsonl", "--set", f"path={tiny_rows}", "--out", "rows"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "plugin p (p 1) failed to load: RuntimeError: broken" in done.stderr
    written = tmp_path / "rows" / "train.jsonl"
    assert written.stat().st_mode & 0o600 == 0o600


def test_signals_end_a_training_although_one_has_ignored_them(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    site = installed(tmp_path, "import signal; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]")
    command = ["env", "-u", "MLXLORA_PLUGINS", f"PYTHONPATH={site}", sys.executable, "-m", "mlxlora_core"]
    arguments = ["--model", tiny_model, "--data", tiny_rows, "--iters", 100_000, "--steps-per-report", 1]
    with subprocess.Popen(
        [*command, "train", *map(str, arguments)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "step      3/" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 143


def test_built_in_plugins_are_not_looked_around(capfd: pytest.CaptureFixture[str]) -> None:
    """Looking takes time, and they are known."""
    assert cli.execute(["components"]) == 0
    assert "put back" not in capfd.readouterr().err
