"""docs/first-plugin.md does what it says: its files are written and its commands run, in order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "first-plugin.md"
BLOCK = re.compile(r"(?:^`([\w./-]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: commands that the page shows failing
REFUSED = {"sampler.a=-1": 2, "mlxlora options sampler top-a\n": 8}


def test_the_page_does_what_it_says(
    tmp_path: Path, tiny_checkpoint: Path, make_environment: Callable[[str], Any]
) -> None:
    environment = make_environment("first-plugin")
    made = environment.mlxlora("convert", "--torch-path", tiny_checkpoint, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    commands = 0
    for name, language, text in BLOCK.findall(PAGE.read_text("utf-8")):
        if name:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        elif language == "console":
            for command, shown in exchanges(text):
                check(environment, command, shown, tmp_path)
                commands += 1
    assert commands == 12, "a block was not found"


def test_it_is_20_lines_and_6() -> None:
    files = {name: text for name, _, text in BLOCK.findall(PAGE.read_text("utf-8")) if name}
    lines = {name: [line for line in text.splitlines() if line.strip()] for name, text in files.items()}
    assert len(lines["top_a.py"]) <= 20
    assert len(lines["mlxlora-top-a/pyproject.toml"]) == 6


def exchanges(block: str) -> list[tuple[str, list[str]]]:
    """(command, lines shown below it) of a console block."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def check(environment: Any, command: str, shown: list[str], folder: Path) -> None:
    """Run one command as a shell would; what the page shows must be among what it prints."""
    done = environment.run("sh", "-c", command, cwd=folder)
    want = next((code for words, code in REFUSED.items() if words in command + "\n"), 0)
    assert done.returncode == want, f"$ {command}\n{done.stdout}{done.stderr}"
    said = [" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines()]
    for line in shown:
        words = " ".join(line.split())
        start = words.removesuffix("…").rstrip()
        there = [one for one in said if one == words or ("…" in line and one.startswith(start))]
        assert there, f"$ {command}\nshows {line!r}, printed {said}"
