"""What there is, is documented: hooks, specs, options, recipes, verbs and the public names."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from mlxlora_core import api, errors, files, hookspecs, ops, specs
from mlxlora_core import plugins as registry
from mlxlora_core.cli.groups import LazyGroup
from mlxlora_core.cli.verbs import VERBS, commands, group
from mlxlora_core.errors import ExitCode
from mlxlora_core.options import Option, explain
from mlxlora_core.plugins.sections import CONFIGS, config_of
from mlxlora_core.runs import recipe, recipe_source

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "loader": "weight-loaders.md",
    "tokenizer": "tokenizers.md",
    "architecture": "architectures.md",
    "adapter": "adapters.md",
    "adapter-loader": "adapter-loaders.md",
    "quantizer": "quantizers.md",
    "builder": "dataset-builders.md",
    "sampler": "samplers.md",
    "exporter": "exporters.md",
    "observer": "observers.md",
    "evaluator": "evaluators.md",
    "command": "commands.md",
    "runtime": "runtimes.md",
    "recipe": "recipes.md",
}
DOORS = {module.__name__: module for module in (api, ops, files)}
BUILT_IN = registry.load(environ={registry.ALLOW_LIST: ""}).components
HOOKS = [name for name in vars(hookspecs) if name.startswith("mlxlora_")]


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def part(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    lines = text.splitlines()
    assert heading in lines, f"there is no heading {heading!r}"
    below = lines[lines.index(heading) + 1 :]
    ends = (i for i, line in enumerate(below) if re.match(rf"#{{1,{level}}} ", line))
    return "\n".join(below[: next(ends, len(below))])


# --- the door -----------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_heading_with_its_signature(hook: str) -> None:
    function = getattr(hookspecs, hook)
    signature = str(inspect.signature(function)).replace("'", "")
    assert f"### `{hook}{signature}`" in page("plugins.md").splitlines()
    assert inspect.getdoc(function)


def test_no_heading_of_a_hook_that_is_gone() -> None:
    assert sorted(re.findall(r"^### `(mlxlora_\w+)", page("plugins.md"), re.MULTILINE)) == sorted(HOOKS)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_field_of_a_spec_stands_below_its_name(kind: str) -> None:
    spec: Any = registry.KINDS[kind][1]
    text = part(page("plugins.md"), f"### {spec.__name__}")
    common = {field.name: field.type for field in dataclasses.fields(specs.Spec)}
    for field in dataclasses.fields(spec):
        if common.get(field.name) != field.type:
            assert f"| `{field.name}: {field.type}` |" in text


def test_the_fields_that_all_specs_have() -> None:
    text = part(page("plugins.md"), "## Specs")
    for field in dataclasses.fields(specs.Spec):
        assert f"| `{field.name}: {field.type}` |" in text


HANDED_OVER = (
    "ForeignModel",
    "LazyTensor",
    "PackedTensor",
    "Layout",
    "ForeignTensor",
    "Piece",
    "Row",
    "Rows",
    "Skipped",
    "RuntimeStarted",
    "Place",
)
FOREIGN = ("ForeignAdapter",)
GIVEN = ("ExportSource", "ExportAdapter", "RunInfo", "Answer")


@pytest.mark.parametrize("name", [*HANDED_OVER, *FOREIGN, *GIVEN])
def test_every_field_of_what_functions_hand_over(name: str) -> None:
    for field in dataclasses.fields(getattr(api, name)):
        assert f"| `{field.name}: {field.type}` |" in page("plugins.md"), f"{name}.{field.name}"


@pytest.mark.parametrize("name", api.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", page("plugins.md")), name


# --- options ------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAGES)
def test_every_kind_has_a_page_that_the_door_links(kind: str) -> None:
    assert page(f"kinds/{PAGES[kind]}").startswith("# ")
    assert f"(kinds/{PAGES[kind]})" in page("plugins.md")
    assert registry.KINDS[kind][0] in page(f"kinds/{PAGES[kind]}"), "the page names its hook"


def test_every_kind_of_component_is_looked_at() -> None:
    assert PAGES.keys() == registry.KINDS.keys()
    kinds = {component.kind for component in BUILT_IN}
    assert kinds == PAGES.keys() - {"command"}, "each kind has a built-in component, or mlxlora has verbs"


@pytest.mark.parametrize("component", BUILT_IN, ids=lambda c: f"{c.kind} {c.id}")
def test_every_component_and_each_of_its_options_is_on_the_page_of_its_kind(component: Any) -> None:
    text = page(f"kinds/{PAGES[component.kind]}")
    assert f"`{component.spec.name}`" in text
    missing = [o.name for o in explain(component.spec.options) if f"`{o.name}`" not in text]
    assert missing == []


@pytest.mark.parametrize("component", BUILT_IN, ids=lambda c: f"{c.kind} {c.id}")
def test_every_option_explains_itself(component: Any) -> None:
    assert inspect.getdoc(component.spec.options)
    for option in explain(component.spec.options):
        assert option.help and not option.help.endswith("."), option.name


# --- recipes ------------------------------------------------------------------


@pytest.mark.parametrize("section", recipe.PLAIN)
def test_every_key_of_a_recipe_is_a_row_with_its_type_and_default(section: str) -> None:
    text = part(page("kinds/recipes.md"), f"## [{section}]")
    known = explain(recipe.PLAIN[section])
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
    assert list(rows) == [o.name for o in known]
    for option in known:
        assert f"| `{option.name}` | {option.type_name} | {_default(option)} | " in text


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_beside_use_is_a_row_with_its_default(kind: str) -> None:
    """On the page of its kind, and in the table of sections."""
    text = part(page("kinds/recipes.md"), "## Sections that name a component")
    (row,) = [line for line in text.splitlines() if f"]` | {kind} |" in line]
    for option in explain(config_of(kind)):
        assert f"`{option.name}`" in row
        below = part(page(f"kinds/{PAGES[kind]}"), "## What the section holds beside the options")
        assert f"| `{option.name}` | " in below
        assert f"| {_default(option)} |" in below


def _default(option: Option) -> str:
    if option.default is None:
        return "none"
    if option.default in ("", ()):
        return "empty"
    return f"`{str(option.default).lower() if isinstance(option.default, bool) else option.default}`"


def test_every_section_that_names_a_component_is_a_row_with_its_default() -> None:
    text = part(page("kinds/recipes.md"), "## Sections that name a component")
    for section, (kind, default, required) in recipe.CHOICES.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `[{section}]` | {kind} |")]
        assert f"`{default}`" in row or (required and row.endswith("| an error |"))


def test_the_recipe_on_the_page_is_a_recipe(tmp_path: Path) -> None:
    block = re.search(r"```toml\n(.*?)```", page("kinds/recipes.md"), re.DOTALL)
    assert block is not None
    (tmp_path / "page.toml").write_text(block[1])
    read = recipe_source.read(tmp_path / "page.toml", [], registry.load(environ={registry.ALLOW_LIST: ""}))
    assert read.adapter.options.rank == 8


# --- the command line ---------------------------------------------------------


def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", DOCS / "make_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert page("cli.md") == module.text(), "run: python docs/make_cli.py"


@pytest.mark.parametrize("verb", commands())
def test_every_flag_of_a_verb_is_there_with_its_meaning(verb: str) -> None:
    """Looked up without the program that writes the page."""
    text = part(page("cli.md"), f"## mlxlora {verb}")
    command = commands()[verb]
    assert command.help
    assert command.help.split("\n")[0] in text
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            for flag in parameter.opts:
                assert re.search(rf"^- `[^`]*{re.escape(flag)}\b[^`]*`: \S", text, re.MULTILINE), flag


def test_help_lists_every_verb_as_its_page_begins() -> None:
    summaries = dict(VERBS)
    for verb, command in commands().items():
        if isinstance(command, LazyGroup):
            summaries |= {f"{verb} {name}": summary for name, summary in command.summaries.items()}
    assert summaries.keys() == commands().keys()
    for verb, command in commands().items():
        assert command.help is not None
        assert command.help.startswith(summaries[verb]), "one sentence for one thing"


def test_exit_codes_are_the_same_wherever_they_are_listed() -> None:
    codes = {str(int(code)) for code in ExitCode} | {"128 + n"}
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    table = readme[readme.index("| exit code | meaning |") :].split("\n\n")[0]
    assert set(re.findall(r"^\| (\d[\d n+]*) \|", table, re.MULTILINE)) == codes
    assert set(re.findall(r"^- (\d[\d n+]*): ", part(page("cli.md"), "## Exit codes"), re.MULTILINE)) == codes
    tree = {cls.__name__: int(cls.exit_code) for cls in errors.MlxloraError.__subclasses__()}
    assert dict(re.findall(r"── (\w+) +(\d+) ", errors.__doc__ or "")) == {n: str(c) for n, c in tree.items()}
    told = re.findall(r"^\| `(\w+Error)` \| (\d+) \|", page("plugins.md"), re.MULTILINE)
    assert told and all(tree[name] == int(code) for name, code in told)


# --- all pages ----------------------------------------------------------------


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


@pytest.mark.parametrize("path", pages(), ids=lambda p: p.relative_to(DOCS).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", pages(), ids=lambda p: p.relative_to(DOCS).as_posix())
def test_python_on_a_page_parses_and_takes_public_names_only(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(_parsed(block)):
            if isinstance(node, ast.ImportFrom) and node.module in DOORS:
                assert {alias.name for alias in node.names} <= set(DOORS[node.module].__all__)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlxlora_core"):
                assert node.module is not None and node.module.startswith("mlxlora_core.testing.")


def _parsed(block: str) -> ast.Module:
    """A block of Python, or of nothing but signatures such as ``detect(folder) -> bool``."""
    if all("->" in line for line in block.splitlines() if line.strip()):
        return ast.Module([], [])
    return ast.parse(block)


# --- the floor plan -----------------------------------------------------------


def test_the_floor_plan_is_that_of_the_code() -> None:
    program = [sys.executable, str(DOCS / "make_architecture.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "run: python docs/make_architecture.py"


def test_the_straight_lines_lead_to_functions_that_are_there() -> None:
    named = re.findall(r"`([a-z_/]+\.py):([A-Za-z_]+)`", page("architecture.md"))
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse((DOCS.parent / "mlxlora_core" / file).read_text("utf-8"))
        assert name in {getattr(node, "name", "") for node in tree.body}, f"{file}:{name}"


def test_the_answers_of_the_floor_plan_are_files_that_are_there() -> None:
    answers = re.findall(r"^\| [^|]+\? \| `([^`]+)` \|", page("architecture.md"), re.MULTILINE)
    assert len(answers) == 12
    for answer in answers:
        assert (DOCS.parent / "mlxlora_core" / answer).exists(), answer


# --- several machines ---------------------------------------------------------


def test_the_tables_and_the_picture_of_networks_are_those_of_the_figures_and_the_model() -> None:
    program = [sys.executable, str(DOCS / "make_network.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "run: python docs/make_network.py"


def test_the_commands_for_several_machines_are_there() -> None:
    lines = re.findall(r"^\$ (?:.* )?mlxlora (.*?)(?: +#.*)?$", page("several-machines.md"), re.MULTILINE)
    assert len(lines) >= 7
    for line in lines:
        verb, *words = line.split()
        command = group.get_command(click.Context(group), verb)
        assert command is not None, verb
        command.make_parser(click.Context(command, info_name=verb)).parse_args(words)
