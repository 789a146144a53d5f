"""What a recipe requires of plugins: names and versions, all told at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlxlora_core.errors import PluginError, UsageError
from mlxlora_core.plugins import Plugin, Registry
from mlxlora_core.runs.recipe_source import read as read_recipe
from mlxlora_core.runs.requirements import check_requirements

THERE = Registry(
    [
        Plugin("lora", "mlxlora", "0.1.0", "built-in", "mlxlora_lora"),
        Plugin("jsonl", "mlxlora", "0.1.0", "built-in", "mlxlora_jsonl", "disabled", "-P no:jsonl"),
        Plugin("widgets", "acme-widgets", "1.10", "installed", "acme"),
        Plugin("early", "early", "2.0rc1", "installed", "early"),
        Plugin("broken", "broken-dist", "3", "installed", "broken", "error", "OSError: gone"),
        Plugin("odd", "odd", "next", "installed", "odd"),
        Plugin("mine", "file", "", "file", "./mine.py"),
    ],
    [],
)


@pytest.mark.parametrize(
    "require",
    [
        (),
        ("widgets",),
        ("acme_widgets >= 1.9",),
        ("ACME.widgets~=1.2", "lora>=0.1,<1", "mlxlora==0.1.*", "mine", "odd"),
        ("early>=2.0rc1",),
        ("early<3",),
    ],
)
def test_what_is_there_passes(require: Sequence[str]) -> None:
    check_requirements(require, THERE)


@pytest.mark.parametrize(
    ("require", "words", "fix"),
    [
        ("widgits>1", "'widgits>1' is not installed (did you mean 'widgets'?)", "pip install 'widgits>1'"),
        ("zzz", "'zzz' is not installed", "pip install 'zzz'"),
        (
            "widgets>=2",
            "'widgets>=2' is asked for, there is acme-widgets 1.10",
            "pip install 'acme-widgets>=2'",
        ),
        ("widgets<1.9", "'widgets<1.9' is asked for, there is", "pip install 'acme-widgets<1.9'"),
        ("early>=2.0", "'early>=2.0' is asked for, there is early 2.0rc1", "pip install 'early>=2.0'"),
        ("jsonl", "plugin jsonl (mlxlora 0.1.0) is disabled (-P no:jsonl)", "see: mlxlora plugins"),
        (
            "broken-dist",
            "plugin broken (broken-dist 3) failed to load: OSError: gone",
            "see: mlxlora plugins",
        ),
        ("odd>0", "there is odd next", "pip install 'odd>0'"),
        ("mine>0", "there is file of no version", "see: mlxlora plugins"),
    ],
)
def test_what_is_not_there_is_8_and_says_what_to_install(require: str, words: str, fix: str) -> None:
    with pytest.raises(PluginError) as caught:
        check_requirements(["lora", require], THERE, "recipe.toml:3")
    assert caught.value.exit_code == 8
    assert words in caught.value.what and "'lora'" not in caught.value.what
    assert (caught.value.fix, caught.value.where) == (fix, "recipe.toml:3")


def test_all_are_told_at_once() -> None:
    with pytest.raises(PluginError) as caught:
        check_requirements(["zzz", "widgets>=2", "lora", "jsonl"], THERE)
    for words in ("'zzz' is not", "'widgets>=2' is asked for", "plugin jsonl"):
        assert words in caught.value.what
    assert caught.value.fix == "pip install 'zzz' 'acme-widgets>=2'"


@pytest.mark.parametrize(
    ("require", "words"),
    [
        ("widgets>", "'widgets>' is no requirement"),
        ("", "'' is no requirement"),
        ("two words", "'two words' is no requirement"),
        ("widgets[all]", "'widgets[all]' says more than a name and versions"),
        ("widgets @ https://example.org/w.whl", "says more than"),
        ("widgets; python_version > '3'", "says more than"),
    ],
)
def test_what_is_no_requirement_is_a_fault_of_the_recipe(require: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_requirements([require], THERE)
    assert words in str(caught.value) and str(caught.value).count("\n") == 0


def test_a_recipe_is_refused_before_its_components_are_missed(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "recipe.toml"
    parts = ['[model]\nmlx_path = "model"\n[data]\nuse = "scrolls"\n[plugins]', "require = ["]
    path.write_text(f'{parts[0]}\n{parts[1]}"scrolls>=1", "mlxlora>=99"]\n')
    with pytest.raises(PluginError) as caught:
        read_recipe(path, [], registry)
    assert caught.value.where == f"{path}:5"
    assert "'scrolls>=1' is not installed" in caught.value.what
    assert "'mlxlora>=99' is asked for, there is mlxlora " in caught.value.what
    with pytest.raises(PluginError, match="no builder 'scrolls'"):
        read_recipe(path, ["plugins.require="], registry)


def test_what_is_required_is_written_down_with_the_run(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[model]\nmlx_path = "model"\n[data]\nuse = "jsonl"\noptions = { path = "rows" }\n'
        f"[plugins]\nrequire = {json.dumps(['mlxlora>=0.1,<99', 'lora'])}\n"
    )
    read = read_recipe(path, [], registry)
    assert read.values()["plugins"] == {"require": ["mlxlora>=0.1,<99", "lora"]}
