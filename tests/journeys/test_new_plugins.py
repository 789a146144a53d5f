"""``plugins new`` for every kind: installed, it passes ``plugins check``, and fails it with one fault."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import cli
from mlxlora_core.plugins import KINDS
from mlxlora_core.testing import fixtures

HERE = Path(__file__).parent
ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")


@dataclass(frozen=True)
class Fault:
    """One change of a module that ``plugins new`` has written, and which test of the suite it breaks."""

    file: str
    good: str
    bad: str
    test: str = ""


FAULTS = {
    kind: [Fault(**one) for one in faults]
    for kind, faults in tomllib.loads((HERE / "new_plugin_faults.toml").read_text("utf-8")).items()
}
DAILY = ("tokenizer",)  # kinds of which all faults are tried by day: what takes least


def name_of(kind: str) -> str:
    return f"my-{kind}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a distribution of each kind, as the verb has written them."""
    folder = tmp_path_factory.mktemp("sources")
    for kind in KINDS:
        target = folder / f"mlxlora-{name_of(kind)}"
        assert cli.execute(["plugins", "new", kind, name_of(kind), "--folder", str(target)]) == 0
    return folder


@pytest.fixture(scope="module")
def environment(sources: Path, make_environment: Callable[[str], Any]) -> Any:
    """An environment in which pip has installed them, as users do."""
    made = make_environment("kinds")
    made.pip("install", "--no-deps", *sorted(sources.iterdir()), cwd=sources)
    return made


def checked(environment: Any, cwd: Path, *targets: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, what is found, and stderr of checking some plugins."""
    done = environment.mlxlora("plugins", "check", "--json", *targets, cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def failures(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, test) of the checks that have failed."""
    return [(one["kind"], one["test"]) for one in found["checks"] if one["result"] == "failed"]


def module_of(environment: Any, kind: str, file: str) -> Path:
    """A file of a plugin where pip has put it."""
    package = f"mlxlora_{name_of(kind).replace('-', '_')}"
    (found,) = environment.folder.glob(f"lib/python*/site-packages/{package}/{file}")
    return Path(found)


# --- what plugins new writes is found, passes, and fails with one fault --------


def test_there_is_a_fault_for_every_kind() -> None:
    assert FAULTS.keys() == KINDS.keys()


def test_each_is_found(environment: Any, tmp_path: Path) -> None:
    done = environment.mlxlora("components", "--json", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    found = {(row["kind"], row["id"]) for row in json.loads(done.stdout)}
    assert {(kind, f"{name_of(kind)}:{name_of(kind)}") for kind in KINDS} <= found


def test_each_passes_and_nothing_that_its_kind_promises_is_left_out(environment: Any, tmp_path: Path) -> None:
    code, found, stderr = checked(environment, tmp_path, *map(name_of, KINDS))
    assert (code, failures(found), stderr) == (0, [], "")
    tried = {kind: [one for one in found["checks"] if one["kind"] == kind] for kind in KINDS}
    assert all(len(checks) >= 3 for checks in tried.values())
    assert [one["test"] for one in found["checks"] if one["result"] == "left out"] == []
    assert all(plugin["heavy"] == [] and plugin["import_ms"] > 0 for plugin in found["plugins"])
    assert [p["components"] for p in found["plugins"]] == [[f"{kind}:{name_of(kind)}"] for kind in KINDS]


def test_one_fault_of_its_kind_fails(environment: Any, tmp_path: Path) -> None:
    for kind, (fault, *_) in FAULTS.items():
        file = module_of(environment, kind, fault.file)
        code = file.read_text("utf-8")
        assert code.count(fault.good) == 1, kind
        file.write_text(code.replace(fault.good, fault.bad))
    try:
        code, found, stderr = checked(environment, tmp_path, *map(name_of, KINDS))
    finally:
        for kind, (fault, *_) in FAULTS.items():
            file = module_of(environment, kind, fault.file)
            file.write_text(file.read_text("utf-8").replace(fault.bad, fault.good))
    failed = failures(found)
    for kind, (fault, *_) in FAULTS.items():
        assert [test for of, test in failed if of == kind and fault.test in test], (kind, failed)
    assert all(one["got"] and one["tried"] for one in found["checks"] if one["result"] == "failed")
    (line,) = stderr.splitlines()
    assert code == 8 and f"{len(failed)} of {len(found['checks'])} checks failed" in line


def planted(folder: Path, kind: str, number: int, fault: Fault) -> Path:
    """A distribution of a kind with a fault, called by its number."""
    target = folder / f"{kind}-{number}"
    assert cli.execute(["plugins", "new", kind, f"{kind}-{number}", "--folder", str(target)]) == 0
    package = f"mlxlora_{kind}_{number}".replace("-", "_")
    file, good, bad = (part.replace("PLUGIN_MODULE", package) for part in (fault.file, fault.good, fault.bad))
    code = (target / package / file).read_text("utf-8")
    assert code.count(good) >= 1, (kind, number, good)
    (target / package / file).write_text(code.replace(good, bad), "utf-8")
    return target


@pytest.mark.parametrize("kind", KINDS if ALL else DAILY)
def test_many_faults_of_a_kind_fail(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each fault that is planted is found, by a test that is about it, and told in a line."""
    folders = [planted(tmp_path, kind, number, fault) for number, fault in enumerate(FAULTS[kind])]
    # A runtime, and what is imported for a verb, changes the process that the others would be tried in.
    batches = [[folder] for folder in folders] if kind in ("runtime", "command") else [folders]
    found = []
    for batch in batches:
        capfd.readouterr()
        assert cli.execute(["plugins", "check", "--json", *map(str, batch)]) == 8
        found += json.loads(capfd.readouterr().out)["checks"]
    for number, fault in enumerate(FAULTS[kind]):
        own = [one for one in found if f"{kind}-{number}" in (one["plugin"], one["component"].split(":")[-1])]
        failed = [one["test"] for one in own if one["result"] == "failed"]
        assert [test for test in failed if fault.test in test], (number, fault, failed)


# --- each by itself -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS if ALL else ["sampler"])
def test_each_alone_installed_as_its_author_does(
    kind: str, sources: Path, make_environment: Callable[[str], Any], tmp_path: Path
) -> None:
    """Editable, in an environment of its own; its tests run by pytest too, and its folder stays as it is."""
    environment = make_environment(kind)
    folder = sources / f"mlxlora-{name_of(kind)}"
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    environment.pip("install", "--no-deps", "-e", folder, cwd=tmp_path)
    for target in (name_of(kind), folder):
        code, found, stderr = checked(environment, tmp_path, target)
        assert (code, failures(found), stderr) == (0, [], "")
        assert [one["test"] for one in found["checks"] if one["result"] == "left out"] == []
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before
    options = ("-q", "-p", "no:cacheprovider")
    tests = environment.run(environment.python, "-m", "pytest", *options, folder, cwd=tmp_path)
    assert tests.returncode == 0, tests.stdout


# --- what else mlxlora makes of them -------------------------------------------


def test_each_has_a_page_whose_recipe_is_read(environment: Any, tmp_path: Path) -> None:
    rest = {
        "model": '[model]\ntorch_path = "base"\n',
        "data": '[data]\nuse = "jsonl"\noptions.path = "rows"\n',
    }
    fixtures.tiny_rows(tmp_path / "rows")
    (tmp_path / "base").mkdir()
    (tmp_path / "PATH").mkdir()  # what stands on a page for a path
    (tmp_path / "PATH" / "a.txt").write_text("A paragraph.\n\nAnother one.\n")
    shown = set()
    for kind in KINDS:
        done = environment.forked("plugins", "docs", name_of(kind), cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert f"\n## {kind} `{name_of(kind)}`\n" in done.stdout
        assert f"$ python -m pip install mlxlora-{name_of(kind)}\n" in done.stdout
        for block in re.findall(r"^```toml\n(.*?)^```$", done.stdout, re.MULTILINE | re.DOTALL):
            (section,) = tomllib.loads(block)
            more = [text for name, text in rest.items() if name != section]
            (tmp_path / f"{kind}.toml").write_text("\n".join([block, *more]))
            read = environment.forked("run", f"{kind}.toml", "--dry-run", cwd=tmp_path)
            assert read.returncode == 0 and f"{name_of(kind)}:{name_of(kind)}" in read.stdout, read.stderr
            shown.add(kind)
    assert shown >= {
        "loader",
        "quantizer",
        "builder",
        "adapter",
        "sampler",
        "exporter",
        "observer",
        "evaluator",
    }


TINY = """
from pathlib import Path
from mlxlora_core.testing.fixtures import tiny_adapter, tiny_model
tiny_adapter(Path("adapter"), tiny_model(Path("model"), "my-architecture"))
"""


def test_a_tiny_model_of_an_architecture_of_ones_own(environment: Any, tmp_path: Path) -> None:
    made = environment.run(environment.python, "-c", TINY, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    adapter = ("--adapter-file", "adapter/adapters.safetensors")
    words = ("generate", "--model", "model", *adapter, "-p", "What is", "-n", "3", "--json")
    done = environment.forked(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# --- what plugins new says ----------------------------------------------------


def ended(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], list[str]]:
    """Exit code and the lines of stdout and stderr."""
    capfd.readouterr()
    code = int(cli.execute(["plugins", "new", *words]))
    out, err = capfd.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_it_lists_what_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = ended(capfd, "sampler", "mlxlora-top-a")
    assert (code, err) == (0, ["try it: mlxlora plugins check mlxlora-top-a"])
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert out == files
    assert "mlxlora-top-a/mlxlora_top_a/__init__.py" in files
    assert "mlxlora-top-a/tests/test_mlxlora_top_a.py" in files
    assert "mlxlora-top-a/.github/workflows/test.yml" in files
    texts = [path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("PLUGIN_" in text for text in texts), "every word is filled in"


def test_what_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(capfd, "adapter", "mine")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = ended(capfd, "adapter", "mine")
    assert (code, out) == (5, []) and "was left alone" in err[0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["Top", "top_a", "-a", "a-", "none", "", "ä", "a b", "../a"])
def test_a_name_that_a_component_cannot_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = ended(capfd, "sampler", "--", name)
    assert (code, out, len(err)) == (2, [], 1)
    assert list(tmp_path.iterdir()) == []


def test_its_help_names_every_kind(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ended(capfd, "--help")
    words = set(re.findall(r"[\w-]+", " ".join(out)))
    assert KINDS.keys() <= words
