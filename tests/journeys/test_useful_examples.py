"""Three distributions in ``examples/``: pip installs them, their tests pass, their READMEs and recipes run.

The model is the one that ships with mlxlora. By day a training is a few steps; at night it is what the
recipe says, and has to have learned its task.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlxlora_demo
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = Path(mlxlora_demo.__file__).parent / "base"
WHOLE = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
SHORT = ("--set", "train.iters=4", "--set", "evaluate.score_rows=2", "--set", "generate.num_tokens=60")

#: what each brings: (kind, name)
BRINGS = {
    "manuals": ("builder", "manuals"),
    "json": ("sampler", "json"),
    "sql": ("evaluator", "sqlite"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the three, which building may write into, with the model in folder DIR of each."""
    folder = tmp_path_factory.mktemp("examples")
    for name in BRINGS:
        shutil.copytree(EXAMPLES / f"mlxlora-{name}", folder / name, ignore=shutil.ignore_patterns("build"))
    return folder


@pytest.fixture(scope="module")
def environment(sources: Path, make_environment: Callable[[str], Any]) -> Any:
    """An environment in which pip has installed the three."""
    pytest.importorskip("docutils", reason="of the manuals; pip install -e '.[dev]'")
    made = make_environment("examples")
    made.pip("install", *(sources / name for name in BRINGS), cwd=sources)
    converted = made.forked(
        "convert", "--torch-path", BASE, "--mlx-path", sources / "manuals" / "DIR", cwd=sources
    )
    assert converted.returncode == 0, converted.stderr
    for name in BRINGS:
        if name != "manuals":
            (sources / name / "DIR").symlink_to(sources / "manuals" / "DIR")
    return made


@pytest.fixture(scope="module")
def records(environment: Any, sources: Path) -> Mapping[str, Any]:
    """run.json of each recipe, after every command of the README was run as it stands."""
    found = {}
    for name in BRINGS:
        for command in commands(sources / name / "README.md"):
            short = () if WHOLE or command[0] != "run" else SHORT
            done = environment.forked(*command, *short, cwd=sources / name)
            assert done.returncode == 0, f"$ mlxlora {shlex.join(command)}\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stderr
            (sources / name / f"{command[0]}.out").write_text(done.stdout)
        found[name] = json.loads((sources / name / "runs" / name / "run.json").read_text())
    return found


def commands(readme: Path) -> list[list[str]]:
    """The command lines of mlxlora in a README."""
    lines = readme.read_text("utf-8").splitlines()
    found = [shlex.split(line)[2:] for line in lines if line.startswith("$ mlxlora ")]
    assert {"run", "plugins"} < {command[0] for command in found}
    return found


def texts(record: Mapping[str, Any], stage: str) -> list[str]:
    """What the model said in a stage."""
    return [answer["text"] for answer in record["stages"][stage]["result"]["answers"]]


@pytest.mark.parametrize("name", BRINGS)
def test_it_is_found(environment: Any, tmp_path: Path, name: str) -> None:
    done = environment.forked("plugins", "--json", cwd=tmp_path)
    (row,) = [row for row in json.loads(done.stdout) if row["name"] == name]
    assert (row["distribution"], row["version"], row["status"]) == (f"mlxlora-{name}", "0.1.0", "active")
    kind, component = BRINGS[name]
    shown = environment.forked("options", kind, component, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    readme = (EXAMPLES / f"mlxlora-{name}" / "README.md").read_text("utf-8")
    table = shown.stdout.splitlines()[2:]
    end = next((i for i, line in enumerate(table) if line.startswith("In the section")), len(table))
    options = [line.split()[0] for line in table[:end]]
    assert options and all(f"| `{option}` |" in readme for option in options), "the README has all options"


@pytest.mark.parametrize("name", BRINGS)
def test_its_own_tests_pass(environment: Any, sources: Path, name: str) -> None:
    folder = sources / name / "tests"
    done = environment.run(environment.python, "-m", "pytest", "-q", folder, cwd=folder)
    assert done.returncode == 0, done.stdout


def test_rows_from_manuals(records: Mapping[str, Any], sources: Path) -> None:
    """All sections of the manual, and what was left out by its line; the README's rows are the code."""
    made = records["manuals"]["stages"]["data"]["result"]
    assert sum(made["rows"].values()) == 16 and min(made["rows"].values()) >= 1
    reasons = {skip["source"]: skip["reason"] for skip in made["skipped"]}
    assert reasons["reference/commands.rst:4"] == "directive 'toctree' is not read"
    paths = (sources / "manuals" / "rows").glob("*.jsonl")
    lines = [line for path in paths for line in path.read_text("utf-8").splitlines()]
    assert len(lines) == 14 and all(json.loads(line)["completion"].endswith("\n```") for line in lines)
    if WHOLE:
        assert "pip install tally" in texts(records["manuals"], "after")[0]


def test_answers_that_are_json(records: Mapping[str, Any], sources: Path) -> None:
    """Before a training as well as after it, to a question that asks for something else as well."""
    for stage in ("before", "after"):
        said = [json.loads(text) for text in texts(records["json"], stage)]
        assert [list(found) for found in said] == [["name", "born", "likes"]] * 2
        assert all(type(found["born"]) is int for found in said)
    said = json.loads((sources / "json" / "generate.out").read_text())
    assert list(said) == ["name", "born"]
    if WHOLE:
        after = json.loads(texts(records["json"], "after")[0])
        assert after == {"name": "Ada", "born": 1815, "likes": "tea"}


def test_queries_that_are_run(records: Mapping[str, Any], sources: Path) -> None:
    """Their scores stand in the record, and the verb prints one."""
    before, after = (scores(records["sql"], stage) for stage in ("before", "after"))
    assert before.keys() == after.keys() == {"sqlite", "exact-match"}
    assert before["sqlite"] == 0 and 0 <= after["exact-match"] <= after["sqlite"] <= 1
    assert "sqlite 0.0000" in (sources / "sql" / "evaluate.out").read_text()
    if WHOLE:
        assert after["sqlite"] >= 0.6  # 9 of 11 where this was written


def scores(record: Mapping[str, Any], stage: str) -> dict[str, float]:
    """evaluator -> mean score in a stage."""
    return {name: found["score"] for name, found in record["stages"][stage]["result"]["scores"].items()}


def test_a_sampler_that_the_tokenizer_has_to_tell_of_refuses_before_a_training(
    environment: Any, records: Mapping[str, Any], sources: Path, tmp_path: Path
) -> None:
    """It is built when the model is open, and no step is done."""
    folder = sources / "json"
    asked = ("--prompt", "Ada", "--sampler", "json", "--set", "sampler.fields=name:string")
    files = ("--model", "DIR", "--data", "rows.jsonl", "--adapter-file", tmp_path / "adapter.safetensors")
    done = environment.forked("train", *files, *asked, "--set", "sampler.within=5", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert "sampler json: the shortest text takes 12 tokens, within is 5. Fix: set within=12" in last
    assert "step" not in done.stderr and not (tmp_path / "adapter.safetensors").exists()
