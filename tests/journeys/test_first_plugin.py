"""docs/first-plugin.md does what it says: its files are written, its commands run, its package published."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import loopback_index
import pytest

pytest.importorskip("twine", reason="needs twine: pip install -e '.[dev]'")

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
PAGE = Path(__file__).parents[2] / "docs" / "first-plugin.md"
BLOCK = re.compile(r"(?:^`([\w./-]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COLOUR = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")
CODE = re.compile(r"exit\s+code\s+(\d+)")


@dataclass(frozen=True)
class File:
    """A file that the page says to write."""

    name: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command that the page says to run, the lines shown below it, and how it ends."""

    words: str
    shown: list[str] = field(default_factory=list)
    code: int = 0


def steps(page: str) -> Iterator[File | Command]:
    """What the page says to do, in order; a paragraph behind commands tells the exit code of the last."""
    blocks = list(BLOCK.finditer(page))
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        name, language, text = block.groups()
        if name:
            yield File(name, text)
        elif language == "console":
            paragraph = page[block.end() : after.start() if after else None].strip().split("\n\n")[0]
            said = CODE.search(paragraph)
            commands = list(_commands(text))
            yield from commands[:-1]
            yield Command(commands[-1].words, commands[-1].shown, int(said[1]) if said else 0)


def _commands(block: str) -> Iterator[Command]:
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        words, *shown = part.splitlines()
        yield Command(words, shown)


@pytest.fixture
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback_index.Index]:
    """In place of PyPI: it has what building takes, and takes what is published."""
    with loopback_index.serving(tmp_path_factory.mktemp("wheels")) as served:
        served.put_installed("hatchling")
        yield served


@pytest.fixture(
    params=[
        "that sees what is installed here",
        pytest.param(
            "that is empty", marks=pytest.mark.skipif(not ALL, reason="by night: MLXLORA_TEST_ALL=1")
        ),
    ]
)
def environment(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_environment: Callable[[str], Any],
    index: loopback_index.Index,
) -> Any:
    """A new one, which knows the index in place of PyPI."""
    made = make_environment("first-plugin")
    variables = {
        **made.variables,
        "PIP_INDEX_URL": f"{index.url}/simple/",
        "PIP_NO_INDEX": "0",
        "TWINE_REPOSITORY_URL": f"{index.url}/legacy/",
        "TWINE_USERNAME": "__token__",
        "TWINE_PASSWORD": loopback_index.TOKEN,  # which one is asked for
    }
    if request.param == "that sees what is installed here":
        return replace(made, variables=variables)
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    hatch = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "built")]
    subprocess.run(hatch, cwd=PAGE.parents[1], check=True, capture_output=True)
    (wheel,) = (tmp_path / "built").iterdir()
    index.put(wheel.name, wheel.read_bytes())
    index.put_needed("mlxlora[cpu,testing]")
    for name in ("build", "twine", "editables"):
        index.put_installed(name)
    del variables["PIP_NO_BUILD_ISOLATION"]
    variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return replace(made, folder=folder, variables={**variables, "VIRTUAL_ENV": str(folder)})


def test_the_page_does_what_it_says(tmp_path: Path, environment: Any, index: loopback_index.Index) -> None:
    folder, codes = tmp_path, []
    for step in steps(PAGE.read_text("utf-8")):
        if isinstance(step, File):
            (folder / step.name).write_text(step.text, "utf-8")
        elif step.words.startswith("cd "):
            folder = (folder / step.words.removeprefix("cd ")).resolve(strict=True)
        else:
            done = environment.run("sh", "-c", step.words, cwd=folder)
            check(step, done)
            codes.append(done.returncode)
            if step.words.startswith("mlxlora plugins new"):
                check_folder(tmp_path / "mlxlora-top-n-sigma")
    assert sorted(code for code in codes if code) == [2, 8], "what fails on the page, and no more"
    made = (tmp_path / "trial" / "runs" / "trial" / "recipe.toml").read_text("utf-8")
    assert 'use = "top-n-sigma:top-n-sigma"' in made and "n = 2.0" in made
    check_published(index, tmp_path / "mlxlora-top-n-sigma")


def check(step: Command, done: Any) -> None:
    """It ends as it should, and what the page shows is among what it prints, in that order."""
    assert done.returncode == step.code, f"$ {step.words}\n{done.stdout}{done.stderr}"
    text = COLOUR.sub("", done.stdout + done.stderr)  # twine has some in a pipe too
    said = [" ".join(line.split()) for line in text.splitlines()]
    rest = iter(said)
    for line in step.shown:
        words = " ".join(line.split())
        pattern = re.compile(".*".join(map(re.escape, words.split("…"))))
        assert any(pattern.fullmatch(one) for one in rest), f"$ {step.words}\nshows {line!r}, printed {said}"


def check_folder(folder: Path) -> None:
    """The file for CI runs what the page says that it runs; the page changes two lines of pyproject.toml."""
    (workflow,) = (folder / ".github" / "workflows").iterdir()
    text = workflow.read_text("utf-8")
    for words in ("push", "ubuntu", "macos", "mlxlora plugins check", "python -m pytest"):
        assert words in text
    (page,) = [
        step.text
        for step in steps(PAGE.read_text("utf-8"))
        if isinstance(step, File) and step.name == "pyproject.toml"
    ]
    written = (folder / "pyproject.toml").read_text("utf-8").splitlines()
    changed = [line.split(" = ")[0] for line in page.splitlines() if line not in written]
    assert changed == ["description", "license"] and len(page.splitlines()) == len(written) + 1


def check_published(index: loopback_index.Index, folder: Path) -> None:
    """What was uploaded is what the page has made, and no more."""
    wheel, source = sorted(index.files["mlxlora-top-n-sigma"])
    assert (folder / "dist" / wheel).read_bytes() == index.files["mlxlora-top-n-sigma"][wheel]
    with zipfile.ZipFile(folder / "dist" / wheel) as archive:
        held = [name for name in archive.namelist() if ".dist-info/" not in name]
    package = "mlxlora_top_n_sigma"
    own = ["__init__.py", "sampling.py", f"tests/test_{package}.py"]
    assert sorted(held) == [f"{package}/{name}" for name in own]
    with tarfile.open(folder / "dist" / source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "pyproject.toml", "tests/test_mlxlora_top_n_sigma.py"} <= names
    assert {upload["filetype"] for upload in index.uploads} == {"bdist_wheel", "sdist"}
    for upload in index.uploads:
        assert (upload["name"], upload["version"]) == ("mlxlora-top-n-sigma", "0.1.0")
        assert upload["description"] == (folder / "README.md").read_text("utf-8")
        assert upload["license_expression"] == "MIT" and upload["requires_dist"].startswith("mlxlora")
    told = "| `n` | number | `1.0` | at least 0 and at most 100 | standard deviations of the logits |"
    assert told in (folder / "README.md").read_text("utf-8")


def test_a_page_that_is_wrong_would_be_found() -> None:
    """The steps are all there, and a line that is not printed, or another exit code, fails."""
    found = list(steps(PAGE.read_text("utf-8")))
    page = PAGE.read_text("utf-8")
    commands = [step for step in found if isinstance(step, Command)]
    assert len(commands) == len(re.findall(r"^\$ ", page, re.MULTILINE))
    assert len(found) - len(commands) == len(re.findall(r"^`[\w./-]+`:$", page, re.MULTILINE)) == 7

    class Done:
        returncode, stdout, stderr = 0, "one  two\nthree\n", "four at 12 ms\n"

    check(Command("x", ["one two", "four at … ms"]), Done)
    for wrong in (Command("x", code=8), Command("x", ["five"]), Command("x", ["three", "one two"])):
        with pytest.raises(AssertionError):
            check(wrong, Done)
