"""``mlxlora plugins docs``: each page tells all that a plugin gives, and what it shows is taken."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from warm import Warm

from mlxlora_core import plugins
from mlxlora_core.cli.plugin_page import MARK, find_plugin, page
from mlxlora_core.cli.verbs import group
from mlxlora_core.options import convert, explain
from mlxlora_core.plugins import KINDS
from mlxlora_core.plugins.sections import config_of
from mlxlora_core.runs.recipe import CHOICES, check_sections, overrides
from mlxlora_core.runs.recipe_source import read

REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
CALLED_BY = {
    "loader": "--loader",
    "quantize": "--quantize",
    "data": "--builder",
    "adapter": "--adapter",
    "sampler": "--sampler",
    "export": "--to",
    "observe": "--observer",
    "evaluator": "--evaluator",
}
REST = {
    "model": '[model]\ntorch_path = "base"\n',
    "data": '[data]\nuse = "jsonl"\noptions = { path = "rows" }\n',
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a table."""
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def check(text: str, registry: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe on a page is one, and every command line is understood."""
    for block in blocks(text, "toml"):
        (section,) = tomllib.loads(block)
        more = [rest for name, rest in REST.items() if name != section]
        (folder / "page.toml").write_text("\n".join([block, *more]))
        with monkeypatch.context() as patched:  # what an observer needs may be absent here
            patched.setattr("mlxlora_core.runs.recipe_source.check_libraries", lambda component: None)
            recipe = read(folder / "page.toml", (), registry)
        held = getattr(recipe, section)
        assert (held[0] if isinstance(held, tuple) else held).component in registry.components
    for block in blocks(text, "console"):
        _, verb, *words = shlex.split(block.removeprefix("$ "))
        if verb == "-m" or any(component.answers_to(verb) for component in registry.of("command")):
            continue  # of pip, or the plugin's own
        command = group.get_command(click.Context(group), verb)
        assert command is not None
        context = command.make_context(verb, list(words))
        sets = overrides(context.params.get("sets", ()))
        check_sections(sets, CHOICES)
        for section, values in sets.items():
            use = words[words.index(CALLED_BY[section]) + 1]
            component = registry.find(CHOICES[section][0], use)
            assert values.keys() <= {option.name for option in explain(component.spec.options)}


@pytest.mark.parametrize("name", [plugin.name for plugin in REGISTRY.plugins])
def test_the_page_of_every_built_in_plugin(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(find_plugin(name, REGISTRY), REGISTRY)
    check(text, REGISTRY, tmp_path, monkeypatch)
    assert text.splitlines()[0] == f"# {name}" and text.splitlines()[-1].startswith(MARK)
    table = rows(text)
    held = [component for component in REGISTRY.components if component.plugin.name == name]
    assert held
    for component in held:
        assert [component.kind, f"`{component.spec.name}`", component.spec.summary] in table
        _, _, part = text.partition(f"\n## {component.kind} `{component.spec.name}`\n")
        own = rows(part.partition("\n## ")[0])
        known = explain(component.spec.options)
        assert [row[0] for row in own[2:]] == [f"`{option.name}`" for option in known]
        for option, row in zip(known, own[2:], strict=True):
            assert row[1] == option.type_name and row[3] == option.allowed and row[4].startswith(option.help)
            if row[2] == "empty":
                assert option.default in ("", ())
            elif row[2] not in ("required", "none"):
                assert convert(row[2].strip("`"), option.type) == option.default
            assert (row[2] == "required") == option.required and (row[2] == "none") == (
                option.default is None
            )
        for option in explain(config_of(component.kind)):
            assert f"`{option.name}`" in [row[0] for row in table]


def test_there_is_a_way_to_use_every_kind() -> None:
    from mlxlora_core.cli import plugin_page

    assert {*plugin_page._CALLS, *plugin_page._BY_ITSELF, "architecture"} == set(KINDS)


STRANGE = '''
from dataclasses import dataclass
from pathlib import Path

import click

from mlxlora_core.api import Command, DatasetBuilder, Sampler, hookimpl, option


@dataclass(frozen=True)
class Wanted:
    """Options without a default."""

    source: Path = option(help="what to read")
    share: float = option(help="how much of it", above=0, below=1)
    count: int = option(help="how many", minimum=3, maximum=9)
    names: tuple[str, ...] = option(help="which")
    form: str = option(help="a|b\\n\\x1b[31m", choices=("wide", "long"))
    deep: bool = option(help="all the way down")


@dataclass(frozen=True)
class Bare:
    """Options that are declared without a word."""

    k: int = 3


@click.command()
@click.option("--loud", is_flag=True, help="Louder.")
def greet(loud):
    """Say hello."""


@hookimpl
def mlxlora_dataset_builders():
    return [DatasetBuilder(name="strange", summary="odd | rows", options=Wanted, build=iter, inputs=dict)]


@hookimpl
def mlxlora_samplers():
    return [Sampler(name="top-k", summary="another one", options=Bare, build=lambda o: lambda l, t: l)]


@hookimpl
def mlxlora_commands():
    return [Command(name="greet", summary="says hello", command=lambda: greet)]
'''


def test_a_plugin_of_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options without defaults, a name that two plugins give, bars and control characters, a command."""
    (tmp_path / "strange.py").write_text(STRANGE)
    registry = plugins.load([str(tmp_path / "strange.py")], environ={plugins.ALLOW_LIST: ""})
    text = page(find_plugin("strange", registry), registry)
    check(text, registry, tmp_path, monkeypatch)
    assert 'use = "strange:top-k"' in text and "$ mlxlora generate --sampler strange:top-k" in text
    assert ["builder", "`strange`", "odd | rows"] in rows(text)
    assert "\x1b" not in text and r"a\|b\n\n\x1b[31m" not in text and r"a\|b\n\x1b[31m" in text
    (recipe,) = [block for block in blocks(text, "toml") if "data" in block]
    values = tomllib.loads(recipe)["data"]["options"]
    assert values == {
        "source": "PATH",
        "share": 0.5,
        "count": 6,
        "names": ["TEXT"],
        "form": "wide",
        "deep": True,
    }
    assert "Usage: mlxlora greet [OPTIONS]" in text and "--loud  Louder." in text


def test_the_verb_writes_a_page_and_replaces_no_other_file(warm: Warm, tmp_path: Path) -> None:
    said = warm.run("plugins", "docs", "samplers", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    want = page(find_plugin("samplers", REGISTRY), REGISTRY)
    assert said.stdout == want
    for _ in range(2):  # it replaces its own
        done = warm.run("plugins", "docs", "samplers", "--output", "page.md", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "page.md\n"), done.stderr
        assert (tmp_path / "page.md").read_text("utf-8") == want
    (tmp_path / "README.md").write_text("# Mine\n")
    done = warm.run("plugins", "docs", "samplers", "--output", "README.md", cwd=tmp_path)
    assert done.returncode == 5 and "README.md" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sampler", "no plugin 'sampler' (did you mean 'samplers'? there is affine, csv"),
        ("mlxlora", "'mlxlora' are several plugins: mlxlora/affine, mlxlora/csv"),
        ("csv", "plugin csv (mlxlora "),
    ],
)
def test_what_has_no_page_is_one_line(name: str, line: str, warm: Warm, tmp_path: Path) -> None:
    done = warm.run("plugins", "docs", name, "-P", "no:csv", cwd=tmp_path)
    assert done.returncode == 8
    assert done.stderr.startswith(f"mlxlora: {line}") and len(done.stderr.splitlines()) == 1
    assert name != "csv" or "disabled" in done.stderr


def test_a_command_that_cannot_be_made_is_one_line_that_names_it(warm: Warm, tmp_path: Path) -> None:
    code = STRANGE.replace("command=lambda: greet", "command=lambda: print('noise') or 1 / 0")
    (tmp_path / "strange.py").write_text(code)
    words = ("plugins", "docs", "strange", "-P", "./strange.py", "--output", "page.md")
    done = warm.run(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (8, "")
    noise, line = done.stderr.splitlines()
    assert noise == "noise" and "in command of command 'greet': ZeroDivisionError" in line
    assert not (tmp_path / "page.md").exists()
