"""``plugins check``: what it finds in plugins whose authors have written no test, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from mlxlora_core import cli
from mlxlora_core import plugins as registry
from mlxlora_core.plugins import KINDS
from mlxlora_core.testing.defaults import SUITES, suite_of

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
Capfd = pytest.CaptureFixture[str]

HEAD = "import sys, os, random, click\nfrom pathlib import Path\nfrom mlxlora_core.api import *\n"
SPEC = "@hookimpl\ndef {hook}():\n    return [{cls}(name='odd', summary='s', {members})]\n"

GOOD = "def build(options): return lambda logits, tokens: logits\n"


def sampler(code: str, build: str = "build") -> str:
    """A plugin in one file with a sampler."""
    return HEAD + code + SPEC.format(hook="mlxlora_samplers", cls="Sampler", members=f"build={build}")


#: kind -> a plugin in one file that breaks what its kind promises, the test that says so, and what that got
FAULTY = {
    "sampler": (
        "def build(options):\n    return lambda logits, tokens: logits * float('nan')\n",
        "build=build",
        "test_gives_logits_that_leave_a_token",
        "nan",
    ),
    "adapter": (
        "def wrap(linear, place, options):\n"
        "    import mlx.core as mx, mlx.nn as nn\n"
        "    class Shifted(nn.Module):\n"
        "        def __init__(self):\n"
        "            super().__init__()\n"
        "            self.linear, self.shift = linear, mx.ones(1)\n"
        "            self.linear.freeze()\n"
        "        def __call__(self, x):\n"
        "            return self.linear(x) + self.shift.astype(x.dtype)\n"
        "    return Shifted() if place.kind == 'linear' and len(place.shape) == 2 else None\n"
        "def fuse(module, weight): return weight\n",
        "wrap=wrap, fuse=fuse",
        "test_starts_as_the_linear",
        "1.0",
    ),
    "quantizer": (
        "def quantize(weight, options):\n"
        "    import mlx.core as mx\n"
        "    return {'w': -weight.astype(mx.float16)}\n"
        "def dequantize(parts, options): return parts['w'].astype('float32')\n",
        "parts=('w',), quantize=quantize, dequantize=dequantize",
        "test_shapes",
        "",
    ),
    "builder": (
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Where:\n    path: Path = option(help='where')\n"
        "def build(options):\n"
        "    texts = [p.read_text() for p in sorted(options.path.iterdir())]\n"
        "    return Rows([Row({'text': t + str(random.random())}) for t in texts])\n"
        "def inputs(options): return {'all': 'same'}\n",
        "options=Where, build=build, inputs=inputs",
        "test_two_builds_are_the_same",
        "Rows(",
    ),
    "observer": (
        "class Loud:\n    def event(self, event): os.write(1, b'news')\n    def end(self, how): pass\n",
        "start=lambda run, options: Loud()",
        "test_stdout_is_not_its_own",
        "news",
    ),
    "evaluator": ("", "score=lambda answer, options: 2.0", "test_scores_are_numbers_from_0_to_1", "2.0"),
    "command": (
        "@click.command()\n@click.option('--debug')\ndef verb(debug): pass\n",
        "command=lambda: verb",
        "test_it_says_what_it_does",
        "odd has no help",
    ),
    "runtime": ("", "start=lambda: 'ready'", "test_says_one_line_or_nothing", ""),
    "recipe": ("", "path=Path('/nowhere/recipe.toml')", "test_the_file_is_there", "there is no recipe.toml"),
    "exporter": (
        "def export(source, target, options): (target / '.hidden').write_text('x')\n",
        "export=export",
        "test_whole_files_and_nothing_else",
        "",
    ),
    "tokenizer": (
        "class Letters:\n"
        "    vocab_size, bos, stops, fingerprint = 300, None, frozenset({299}), 'f'\n"
        "    def encode(self, text, *, bos=True, eos=False): return [*text.lower().encode()]\n"
        "    def decode(self, ids): return bytes(i for i in ids if i < 256).decode('utf-8', 'replace')\n"
        "    def stream(self, ids, every=1): yield self.decode(list(ids))\n"
        "    def render(self, messages, tools=()): raise DataError('no')\n",
        "detect=lambda files: 'tokenizer.json' in files, open=lambda files, options: Letters()",
        "test_a_text_comes_back_as_it_was",
        "the quick brown fox.",
    ),
}


def write(folder: Path, name: str, code: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(code)
    return path


def check(capfd: Capfd, *targets: object) -> tuple[int, dict[str, Any], list[str]]:
    """Exit code, what is found, and the lines of stderr."""
    capfd.readouterr()
    code = int(cli.execute(["plugins", "check", "--json", *map(str, targets)]))
    out, err = capfd.readouterr()
    return code, json.loads(out or "{}"), err.splitlines()


def by_test(found: dict[str, Any], kind: str = "") -> dict[str, dict[str, Any]]:
    """Test without its parameters -> what came of it."""
    return {one["test"].partition("[")[0]: one for one in found["checks"] if kind in ("", one["kind"])}


# --- what it finds ------------------------------------------------------------


def test_every_kind_has_a_suite() -> None:
    assert SUITES.keys() == KINDS.keys()
    assert all(suite_of(kind).__doc__ for kind in KINDS)


def test_what_ships_in_the_box_passes_without_the_tests_of_its_authors(capfd: Capfd) -> None:
    installed = registry.load(environ={registry.ALLOW_LIST: ""}).plugins
    names = [plugin.name for plugin in installed if plugin.origin == "built-in"]
    code, found, lines = check(capfd, *(names if ALL else ("samplers", "hf", "csv", "openblas", "demo")))
    assert [one for one in found["checks"] if one["result"] == "failed"] == []
    assert code == 0 and not [line for line in lines if line.startswith("mlxlora")]
    assert {"passed", "left out", "does not apply"} >= {one["result"] for one in found["checks"]}
    read = "test_an_independent_reader_finds_every_number"
    tried = [one for one in found["checks"] if one["component"] == "hf:hf" and one["test"].startswith(read)]
    assert [one["result"] for one in tried] == ["passed"], "what it writes is read by the loader in the box"
    tried = [one for one in found["checks"] if (one["kind"], one["component"]) == ("loader", "hf:hf")]
    results = Counter(one["result"] for one in tried)
    assert results == {"passed": 7, "left out": 3, "does not apply": 1}, "and so is that loader"


def test_a_loader_is_tried_on_the_sample_that_it_ships_with(tmp_path: Path, capfd: Capfd) -> None:
    assert cli.execute(["plugins", "new", "loader", "odd", "--folder", str(tmp_path / "odd")]) == 0
    shutil.rmtree(tmp_path / "odd" / "tests")
    sample = tmp_path / "odd" / "mlxlora_odd" / "sample"
    sample.mkdir()
    numpy.savez(sample / "weights.npz", a=numpy.arange(6.0, dtype="float32"))
    (sample / "odd.json").write_text('{"model": {"model_type": "llama"}, "tokenizer": ["tokenizer.model"]}')
    (sample / "tokenizer.model").write_text("pieces")
    code, found, _ = check(capfd, tmp_path / "odd")
    by = by_test(found, "loader")
    assert code == 0 and by["test_names_shapes_dtypes_and_values"]["result"] == "passed"
    assert by["test_a_spoilt_file_is_refused_or_makes_no_difference"]["result"] == "passed"
    left = {one["missing"]: one["why"] for one in found["checks"] if one["result"] == "left out"}
    suite = "a subclass of mlxlora_core.testing.weight_loader.WeightLoaderSuite in tests/"
    assert left == {name: f"define {name} in {suite}" for name in ("damage", "write", "write_large")}
    # In the table it is one line that tells what to do.
    assert cli.execute(["plugins", "check", str(tmp_path / "odd")]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if "left out:" in line]
    assert [line.partition("left out: ")[2] for line in said] == [
        f"define damage, write_large, write in {suite}"
    ]


def test_it_finds_what_is_wrong_without_a_test_of_the_authors(tmp_path: Path, capfd: Capfd) -> None:
    files = []
    for kind, (code, members, _, _) in FAULTY.items():
        hook, spec = KINDS[kind]
        text = HEAD + code + SPEC.format(hook=hook, cls=spec.__name__, members=members)
        files.append(write(tmp_path, f"odd_{kind}", text))
    code, found, lines = check(capfd, *files)
    assert code == 8, lines
    for kind, (_, _, test, got) in FAULTY.items():
        one = by_test(found, kind)[test]
        assert one["result"] == "failed", (kind, one)
        assert got in one["got"] and one["tried"], (kind, one)
    failed = sum(one["result"] == "failed" for one in found["checks"])
    assert f"{failed} of {len(found['checks'])} checks failed" in lines[-1]


def test_what_an_import_costs(tmp_path: Path, capfd: Capfd) -> None:
    light = sampler(GOOD)
    files = [write(tmp_path, "light", light), write(tmp_path, "heavy", "import numpy, mlx.core\n" + light)]
    code, found, _ = check(capfd, *files)
    assert code == 8
    plugins = {plugin["name"]: plugin for plugin in found["plugins"]}
    assert plugins["light"]["heavy"] == [] and plugins["light"]["import_ms"] > 0
    assert plugins["heavy"]["heavy"] == ["mlx", "numpy"]
    (one,) = [one for one in found["checks"] if one["result"] == "failed"]
    assert (one["plugin"], one["test"], one["got"]) == ("heavy", "import", "mlx, numpy")
    # Both call their sampler the same, and each has been tried.
    tried = {one["component"] for one in found["checks"] if one["result"] == "passed"}
    assert tried >= {"light:odd", "heavy:odd"}


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        (HEAD + "@hookimpl\ndef mlxlora_sampler(): return []", "did you mean 'mlxlora_samplers'?"),
        ("import os\nos._exit(3)", "it called os._exit(3)"),
        (
            HEAD + SPEC.format(hook="mlxlora_samplers", cls="Sampler", members="build=lambda: 1"),
            "build of 'odd' takes",
        ),
    ],
    ids=["import", "hook", "exit", "spec"],
)
def test_a_plugin_that_cannot_be_loaded(tmp_path: Path, capfd: Capfd, code: str, got: str) -> None:
    ended, found, lines = check(capfd, write(tmp_path, "broken", code))
    assert ended == 8 and "checks failed" in lines[-1]
    assert by_test(found)["load"]["result"] == "failed"
    assert got in by_test(found)["load"]["got"]
    assert found["plugins"][0]["components"] == []


ENDLESS = """
import ctypes, dataclasses
@dataclasses.dataclass(frozen=True)
class Bare: pass
@dataclasses.dataclass(frozen=True)
class Silent:
    a: int = option(1, help="")
def hangs(options):
    def change(logits, tokens):
        while logits.shape[1] == 1: pass
        return logits
    return change
def dies(options): return lambda logits, tokens: ctypes.string_at(0) if logits.shape[0] == 4 else logits
def interrupts(options):
    def change(logits, tokens):
        if logits.shape[0] == 4: raise KeyboardInterrupt
        return logits
    return change
def prints(options):
    from mlxlora_core.model import drawing
    os.write(1, b"noise")
    return lambda logits, tokens: logits
@hookimpl
def mlxlora_samplers():
    samplers = (hangs, dies, interrupts, prints)
    return [Sampler(name=one.__name__, summary="s", options=Bare, build=one) for one in samplers[:-1]] + [
        Sampler(name="prints", summary="s", options=Silent, build=prints)]
"""


INTERRUPTED = "the checks were ended by KeyboardInterrupt"


def test_what_never_ends_or_ends_the_process_has_failed_and_the_rest_is_tried(
    tmp_path: Path, capfd: Capfd
) -> None:
    files = [
        write(tmp_path, "at_import", "import ctypes; ctypes.string_at(0)\n"),
        write(tmp_path, "at_loading", HEAD + "@hookimpl\ndef mlxlora_samplers():\n    while True: pass\n"),
        write(tmp_path, "in_use", HEAD + ENDLESS),
    ]
    code, found, lines = check(capfd, "--timeout", "2", *files)
    failed = {
        (c["component"] or c["plugin"], c["test"].partition("[")[0]): c
        for c in found["checks"]
        if c["result"] == "failed"
    }
    assert {name: one["got"] for name, one in failed.items()} == {
        ("at_import", "import"): "the process was ended by SIGSEGV",
        ("at_loading", "load"): "no end after 2 s",
        ("in_use:hangs", "test_gives_logits_that_leave_a_token"): "no end after 2 s",
        ("in_use:dies", "test_every_row_is_changed_by_itself"): "the process was ended by SIGSEGV",
        (
            "in_use:interrupts",
            "test_every_row_is_changed_by_itself",
        ): INTERRUPTED,
        ("in_use:prints", "stdout"): 3 * "noise",
        ("in_use:prints", "help"): "none of a",
        ("in_use", "doors"): "in_use.py:23 imports mlxlora_core.model",
    }
    assert failed["at_loading", "load"]["where"] == "at_loading.py:6"
    assert failed["in_use:hangs", "test_gives_logits_that_leave_a_token"]["where"] == "in_use.py:13"
    passed = Counter(one["component"] for one in found["checks"] if one["result"] == "passed")
    assert passed == {"": 3, "in_use:hangs": 6, "in_use:dies": 6, "in_use:interrupts": 6, "in_use:prints": 7}
    assert code == 8 and f"8 of {len(found['checks'])} checks failed" in lines[-1]


def test_one_that_hangs_is_ended_by_a_signal(tmp_path: Path) -> None:
    """And leaves no process behind."""
    mark = tmp_path / "pid"
    says = f"Path({str(mark)!r}).write_text(str(os.getpid()))"
    hangs = f"import time\ndef build(options):\n    {says}\n    time.sleep(600)\n"
    path = write(tmp_path, "hangs", sampler(hangs))
    command = [sys.executable, "-m", "mlxlora_core", "plugins", "check", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (mark.exists() and mark.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and len(err.splitlines()) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


# --- folders ------------------------------------------------------------------

PROJECT = """
[project]
name = "{name}"
version = "1.2"
[project.entry-points.mlxlora]
{entry} = "{module}"
"""
PLUGIN = sampler(GOOD)
TESTS = """
from plain import mlxlora_samplers
from mlxlora_core.testing.sampler import SamplerSuite

class TestMine(SamplerSuite):
    (spec,) = mlxlora_samplers()

    def test_of_my_own(self):
        assert 2 + 2 == 5

def test_beside_the_suite():
    raise AssertionError("is the author's affair")
"""


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A folder that is not installed, its module in src."""
    folder = tmp_path / "plain"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "plain.py").write_text(PLUGIN)
    (folder / "pyproject.toml").write_text(PROJECT.format(name="plain", entry="plain", module="plain"))
    return folder


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_need_not_be_installed_and_stays_as_it_is(
    distribution: Path, capfd: Capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXLORA_PLUGINS", "")
    monkeypatch.setenv("PYTHONPATH", "beside")
    monkeypatch.chdir(distribution)
    (distribution / "beside").mkdir()
    (distribution / "beside" / "its_library.py").touch()
    (distribution / "src" / "plain.py").write_text(f"import its_library\n{PLUGIN}")
    before = names_below(distribution)
    code, found, lines = check(capfd)
    assert (code, lines) == (0, [])
    assert names_below(distribution) == before
    assert found["plugins"][0] | {"import_ms": 0} == {
        "name": "plain",
        "distribution": "plain",
        "version": "1.2",
        "components": ["sampler:odd"],
        "import_ms": 0,
        "heavy": [],
    }


def test_the_suite_of_the_author_comes_before_a_guessed_one(distribution: Path, capfd: Capfd) -> None:
    (distribution / "tests").mkdir()
    (distribution / "tests" / "test_plain.py").write_text(TESTS)
    code, found, lines = check(capfd, distribution)
    assert code == 8 and "plain: 1 of" in lines[-1]
    tests = by_test(found)
    assert (tests["test_of_my_own"]["got"], tests["test_of_my_own"]["want"]) == ("4", "5")
    assert "test_beside_the_suite" not in tests
    assert tests["test_gives_logits_that_leave_a_token"]["times"] == 21, "once, not by two suites"


def test_a_test_file_that_cannot_be_read_is_told(distribution: Path, capfd: Capfd) -> None:
    (distribution / "tests").mkdir()
    (distribution / "tests" / "test_plain.py").write_text("import no_such_module\n")
    code, found, _ = check(capfd, distribution)
    assert code == 8
    (one,) = [one for one in found["checks"] if one["result"] == "failed"]
    assert by_test(found, "sampler")["test_nothing_is_random_in_it"]["result"] == "passed"
    assert "test_plain.py" in one["test"] and "no_such_module" in one["got"]


def test_a_conftest_that_fails_is_told_and_the_rest_is_tried(distribution: Path, capfd: Capfd) -> None:
    (distribution / "tests").mkdir()
    (distribution / "tests" / "conftest.py").write_text("import no_such_module\n")
    code, found, _ = check(capfd, distribution)
    (one,) = [one for one in found["checks"] if one["result"] == "failed"]
    assert code == 8 and one["test"] == "conftest.py" and "no_such_module" in one["got"]
    assert by_test(found, "sampler")["test_nothing_is_random_in_it"]["suite"] == "guessed", (
        "without its tests"
    )


def test_what_is_printed(distribution: Path, capfd: Capfd) -> None:
    (distribution / "src" / "plain.py").write_text(PLUGIN.replace("tokens: logits", "tokens: logits[0]"))
    assert cli.execute(["plugins", "check", str(distribution)]) == 8
    out, err = capfd.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("plain (plain 1.2): sampler:odd, imported in ")
    assert lines[1] == "component tried result"
    assert "plain Its import brings nothing heavy. passed" in lines
    test = "test_gives_logits_that_leave_a_token[{}-spread-a begin token]"
    at = lines.index(f"failed: sampler plain:odd: {test}")
    assert lines[at + 1].startswith("tried Logits (B, V)")
    assert lines[at + 2] == "got ((10,), mlx.core.float32)"
    assert lines[at + 3] == "want ((1, 10), mlx.core.float32)"
    assert lines[at + 4].startswith("where sampler.py:")
    assert err.splitlines()[-1].startswith("mlxlora: plain: ")


# --- what cannot be checked ---------------------------------------------------


def damaged(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[project\n")


def no_entry(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[project]\nname = 'plain'\n")


def elsewhere(folder: Path) -> None:
    (folder / "src").rename(folder / "lib")


def nothing(folder: Path) -> None:
    (folder / "pyproject.toml").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (nothing, "there is no pyproject.toml"),
        (damaged, "pyproject.toml:1:9: is no TOML"),
        (no_entry, "it has no entry point of group mlxlora"),
        (elsewhere, "the module plain of entry point 'plain' is neither in this folder nor in src"),
    ],
)
def test_a_folder_that_holds_no_plugin(
    distribution: Path, capfd: Capfd, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(distribution)
    code, _, lines = check(capfd, distribution)
    assert code == 2 and len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    ("target", "said", "ends"),
    [
        ("samplres", "no plugin 'samplres' (did you mean 'samplers'?", 8),
        ("./none.py", "there is no such file", 2),
        ("rows.txt", "rows.txt cannot be imported by its name", 2),
        ("two-words.py", "two-words.py cannot be imported by its name", 2),
    ],
)
def test_a_name_that_stands_for_nothing(
    tmp_path: Path, capfd: Capfd, monkeypatch: pytest.MonkeyPatch, target: str, said: str, ends: int
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.txt", "two-words.py"):
        (tmp_path / name).touch()
    code, _, lines = check(capfd, target)
    assert code == ends and len(lines) == 1 and said in lines[0]


def test_without_pytest_it_is_said_what_to_install(
    distribution: Path, capfd: Capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "pytest" else find(name, *more)
    )
    code, _, lines = check(capfd, distribution)
    assert code == 2 and "Fix: pip install 'mlxlora[testing]'" in lines[0]
