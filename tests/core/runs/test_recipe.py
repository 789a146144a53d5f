"""Recipes: read, checked, overridden and written down again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mlxlora_core import specs
from mlxlora_core.errors import PluginError, UsageError
from mlxlora_core.options import NoOptions, option
from mlxlora_core.plugins import Component, Plugin, Registry
from mlxlora_core.plugins.sections import AdapterConfig, QuantizeConfig, SplitConfig
from mlxlora_core.runs.recipe import COMMAND_LINE, DEFAULT, Recipe, check_sections, choose, overrides
from mlxlora_core.runs.recipe_source import read


@dataclass(frozen=True)
class RankOptions:
    """A rank."""

    rank: int = option(8, help="rank", minimum=1)


@dataclass(frozen=True)
class FileOptions:
    """Paths."""

    path: Path = option(help="what to read")
    more: tuple[Path, ...] = option((), help="what else to read")
    spare: Path | None = option(None, help="another one")
    title: str = option("", help="text that looks like a path")


@dataclass(frozen=True)
class TempOptions:
    """A temperature."""

    temp: float = option(0.8, help="temperature", minimum=0)


@pytest.fixture
def registry() -> Registry:
    """Components without a function behind them, and a plugin that failed."""

    def never(*_: Any) -> Any:
        raise AssertionError("reading a recipe calls no component")

    box = Plugin("box", "box-dist", "1", "installed", "box")
    other = Plugin("other", "other-dist", "1", "installed", "other")
    gone = Plugin(
        "gone", "gone-dist", "1", "installed", "gone", status="error", reason="ImportError: no gone"
    )
    adapter: Callable[..., Any] = specs.Adapter
    quantizer = partial(specs.Quantizer, parts=("q",))
    kinds: list[tuple[str, Any, Plugin]] = [
        ("loader", specs.WeightLoader(name="pth", summary="s", detect=never, open=never), box),
        ("quantizer", quantizer(name="affine", summary="s", quantize=never, dequantize=never), box),
        (
            "builder",
            specs.DatasetBuilder(name="files", summary="s", options=FileOptions, build=never, inputs=never),
            box,
        ),
        ("adapter", adapter(name="lora", summary="s", options=RankOptions, wrap=never, fuse=never), box),
        ("adapter", adapter(name="scale", summary="s", wrap=never, fuse=never), box),
        ("adapter", adapter(name="twin", summary="s", options=RankOptions, wrap=never, fuse=never), box),
        ("adapter", adapter(name="twin", summary="s", options=RankOptions, wrap=never, fuse=never), other),
        ("sampler", specs.Sampler(name="greedy", summary="s", build=never), box),
        ("sampler", specs.Sampler(name="warm", summary="s", options=TempOptions, build=never), box),
    ]
    return Registry([box, other, gone], [Component(*parts) for parts in kinds])


MINIMAL = """
[model]
torch_path = "checkpoint"

[data]
use = "files"
options = { path = "rows" }
"""


@pytest.fixture
def recipe(tmp_path: Path, registry: Registry) -> Callable[..., Recipe]:
    """Reads a recipe's text, with what ``--set`` says over it."""

    def make(text: str, *sets: str, name: str = "mine.toml") -> Recipe:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return read(path, sets, registry)

    return make


@pytest.fixture
def fault(recipe: Callable[..., Recipe]) -> Callable[..., str]:
    """The one line that a bad recipe gets."""

    def make(text: str, *sets: str, kind: type[Exception] = UsageError) -> str:
        with pytest.raises(kind) as caught:
            recipe(text, *sets)
        message = str(caught.value)
        assert message.isprintable()
        assert "mine.toml" in message or "--set" in message
        return message

    return make


# --- good recipes -------------------------------------------------------------


def test_the_run_folder_may_be_in_the_home_of_a_user(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipe(MINIMAL, "run.folder=~/x").folder == tmp_path / "x"


def test_a_small_recipe_is_filled_in(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    got = recipe(MINIMAL)
    assert got.name == "mine"
    assert got.folder == Path("runs/mine")
    assert got.model.torch_path == tmp_path / "checkpoint"
    assert got.data.options == FileOptions(path=tmp_path / "rows")
    assert (got.adapter.component.spec.name, got.adapter_config) == ("lora", AdapterConfig())
    assert [choice.component.spec.name for choice in got.sampler] == ["greedy"]
    assert got.data_config == SplitConfig(0.1, 0, 1000)
    assert got.loader is None and (got.quantize, got.quantize_config) == (None, QuantizeConfig(head=False))
    assert got.train.iters == 1000


def test_the_command_line_is_over_the_recipe_and_that_over_defaults(recipe: Callable[..., Recipe]) -> None:
    text = MINIMAL + "[adapter]\nuse = 'lora'\nlayers = 2\n[adapter.options]\nrank = 4\n[train]\niters = 7\n"
    got = recipe(text, "adapter.rank=16", "train.batch_size=2", "adapter.options.targets=wq")
    assert got.adapter.options == RankOptions(rank=16)
    assert got.adapter_config == AdapterConfig(("wq",), 2)
    assert (got.train.iters, got.train.batch_size) == (7, 2)
    want = {
        "adapter.use": "mine.toml",
        "adapter.rank": COMMAND_LINE,
        "adapter.layers": "mine.toml",
        "train.batch_size": COMMAND_LINE,
        "train.iters": "mine.toml",
        "train.warmup": DEFAULT,
        "sampler.use": DEFAULT,
        "model.torch_path": "mine.toml",
    }
    assert {name: got.origins[name] for name in want} == want


def test_every_value_has_an_origin(recipe: Callable[..., Recipe]) -> None:
    got = recipe(MINIMAL)
    for section, table in got.values().items():
        keys = [*(key for key in table if key != "options"), *table.get("options", {})]
        assert all(f"{section}.{key}" in got.origins for key in keys)


def test_what_is_written_down_reads_back_the_same_from_anywhere(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MINIMAL + (
        '[generate]\nprompts = ["Q: \\u00e9?\\nA:", "\\"\'"]\n[adapter]\nuse = "other:twin"\n'
        '[quantize]\nuse = "affine"\n[sampler]\nuse = "warm"\noptions = { temp = 0 }\n'
    )
    got = recipe(text, "data.more=a,b", "run.folder=out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = recipe(tomli_w.dumps(got.values()), name="elsewhere/recipe.toml")
    assert again.values() == got.values()
    assert again.adapter.component is got.adapter.component
    assert again.name == "elsewhere"


def test_paths_are_relative_to_the_recipe_and_on_the_command_line_to_the_working_directory(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    text = (
        "[model]\ntorch_path = '../checkpoint'\n[data]\nuse = 'files'\n"
        "options = { path = '/rows', more = ['a', '~/b'], spare = 'none', title = 'a/b' }\n"
    )
    got = recipe(text)
    assert got.model.torch_path == tmp_path.parent / "checkpoint"
    assert got.data.options == FileOptions(
        path=Path("/rows"), more=(tmp_path / "a", Path.home() / "b"), spare=None, title="a/b"
    )
    got = recipe(text, "data.path=rows", "data.more=['c']", "model.torch_path=none", "model.mlx_path=base")
    assert got.data.options.path == tmp_path / "work" / "rows"
    assert got.data.options.more == (tmp_path / "work" / "c",)
    assert (got.model.torch_path, got.model.mlx_path) == (None, tmp_path / "work" / "base")


def test_a_component_put_in_place_of_another_does_not_get_its_options(recipe: Callable[..., Recipe]) -> None:
    text = MINIMAL + "[adapter]\nuse = 'lora'\noptions = { rank = 4 }\n"
    got = recipe(text, "adapter.use=scale")
    assert got.adapter.options == NoOptions()
    assert got.origins["adapter.use"] == COMMAND_LINE
    # The same one under its full id keeps them, and so does the default when nothing is named.
    assert recipe(text, "adapter.use=box:lora").adapter.options.rank == 4
    bare = MINIMAL + "[adapter]\noptions = { rank = 4 }\n"
    assert recipe(bare).adapter.options.rank == 4
    assert recipe(bare, "adapter.use=scale").adapter.options == NoOptions()
    assert recipe(text, "adapter.use=other:twin", "adapter.rank=2").adapter.options.rank == 2


def test_parts_that_may_be_left_out(recipe: Callable[..., Recipe]) -> None:
    text = MINIMAL + "[quantize]\nuse = 'affine'\nhead = true\n"
    assert recipe(text).quantize_config.head is True
    assert recipe(text, "quantize.use=none").quantize is None
    assert recipe(MINIMAL + "[quantize]\nuse = 'none'\n").quantize is None
    assert recipe(MINIMAL, "quantize.use=affine").quantize is not None


def test_what_core_decides_stands_beside_the_component(recipe: Callable[..., Recipe]) -> None:
    text = MINIMAL.replace("options =", "test_set_size = 0.2\nsplit_seed = 3\noptions =") + (
        "[adapter]\nlayers = 4\ntargets = ['wo']\noptions = { rank = 2 }\n"
    )
    got = recipe(text)
    assert got.adapter_config == AdapterConfig(("wo",), 4)
    assert got.data_config == SplitConfig(0.2, 3, 1000)
    sets = ("adapter.layers=-1", "adapter.rank=16", "data.test_set_size=0.5", "adapter.targets=wq,wv")
    sets += ("adapter.overrides=wq: rank=3",)
    got = recipe(text, *sets, "quantize.use=affine", "quantize.head=yes")
    assert (got.adapter_config, got.adapter.options.rank) == (
        AdapterConfig(("wq", "wv"), -1, ("wq: rank=3",)),
        16,
    )
    assert (got.data_config.test_set_size, got.quantize_config.head) == (0.5, True)
    assert got.origins["adapter.layers"] == COMMAND_LINE
    assert got.origins["data.split_seed"] == "mine.toml"
    assert got.values()["adapter"] == {
        "use": "box:lora",
        "targets": ["wq", "wv"],
        "layers": -1,
        "overrides": ["wq: rank=3"],
        "options": {"rank": 16},
    }
    # Another adapter goes where the one that it replaces would have gone.
    assert recipe(text, "adapter.use=scale").adapter_config == AdapterConfig(("wo",), 4)


def test_recipes_in_run_folders_of_before_have_these_keys_in_options(recipe: Callable[..., Recipe]) -> None:
    text = MINIMAL.replace("{ path", "{ test_set_size = 0.3, path") + (
        "[adapter]\nuse = 'lora'\n[adapter.options]\nlayers = 4\ntargets = ['wo']\nrank = 2\n"
    )
    got = recipe(text)
    assert (got.adapter_config, got.adapter.options.rank) == (AdapterConfig(("wo",), 4), 2)
    assert got.data_config.test_set_size == 0.3


@pytest.mark.parametrize(
    "text", ["\ufeff" + MINIMAL, MINIMAL.replace("\n", "\r\n"), MINIMAL.replace("[data]", "[ data ]")]
)
def test_spellings_of_toml(recipe: Callable[..., Recipe], text: str) -> None:
    assert recipe(text).model.torch_path is not None


def test_a_recipe_is_named_by_its_file_or_folder(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert recipe(MINIMAL, name="demo/recipe.toml").name == "demo"
    assert recipe(MINIMAL, name="demo/other.toml").name == "other"


# --- bad recipes --------------------------------------------------------------


def test_unknown_sections_are_all_told_with_their_nearest(fault: Callable[..., str]) -> None:
    message = fault(MINIMAL + "[adaptor]\nuse = 'lora'\n[trian]\n")
    assert "no section 'adaptor' (did you mean 'adapter'? there is run, model," in message
    assert "no section 'trian' (did you mean 'train'?" in message
    assert "mine.toml:8: no section 'adaptor'" in fault(MINIMAL + "[adaptor]\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\niter = 3\n", "mine.toml:8: [train] has no option 'iter' (did you mean 'iters'?"),
        ("[train]\niters = -1\n", "option 'iters': must be at least 1, got -1"),
        ("[train]\niters = 1.5\n", "wanted a whole number, got 1.5"),
        ("[train]\noptimizer = 'sgd'\n", "must be one of adam, adamw, muon, got 'sgd'"),
        ("[train]\niters = 2024-01-01\n", "wanted a whole number, got datetime.date(2024, 1, 1)"),
        ("[train]\nwarmup = 9\niters = 5\n", "[train]: warmup must be less than iters (5), got 9"),
        ("[adapter]\noptions = { rank = 0 }\n", "mine.toml:8: adapter 'lora' option 'rank': must be at"),
        ("[adapter]\noptions = { rnak = 2 }\n", "no option 'rnak' (did you mean 'rank'?"),
        (
            "[adapter]\nrank = 2\n",
            "[adapter] has no key 'rank' (options go under options, it has use, targ",
        ),
        ("[adapter]\nues = 'lora'\n", "[adapter] has no key 'ues' (did you mean 'use'?"),
        ("[adapter]\nuse = 3\n", "[adapter] use: wanted text, got 3"),
        ("[adapter]\nuse = []\n", "[adapter] use: wanted text, got []"),
        ("[adapter]\nuse = false\n", "[adapter] use: wanted text, got False"),
        ("[adapter]\noptions = 3\n", "[adapter] options must be a table, got 3"),
        ("[adapter]\nuse = ''\n", "[adapter] use is required: the adapter (there is lora, scale, twin)"),
        ("[adapter]\nuse = 'none'\n", "[adapter] use is required"),
        ("[sampler]\nuse = 'none'\n", "[sampler] use is required: the sampler (there is greedy, warm)"),
        ("[adapter]\nlayer = 2\n", "[adapter] has no key 'layer' (did you mean 'layers'?"),
        ("[adapter]\nlayers = 0\n", "mine.toml:8: adapter 'lora': layers must be -1 or at least 1, got 0"),
        ("[adapter]\nlayers = 2\noptions = { layers = 3 }\n", "[adapter] has layers twice, beside use and"),
        (
            "[adapter]\noptions = { layres = 2 }\n",
            "no option 'layres' (did you mean 'layers'? it has ran",
        ),
        (
            "[sampler]\nlayers = 2\n",
            "[sampler] has no key 'layers' (options go under options, it has use",
        ),
        ("[quantize]\noptions = { head = true }\n", "[quantize] has head but names no component"),
        ("[quantize]\nhead = true\n", "[quantize] has head but names no component"),
        ("[[train]]\niters = 3\n", "'train' must be a table"),
    ],
)
def test_faults_have_a_place_and_a_remedy(fault: Callable[..., str], text: str, words: str) -> None:
    assert words in fault(MINIMAL + text)


def test_faults_of_all_sections_are_told_at_once(fault: Callable[..., str]) -> None:
    message = fault(
        MINIMAL + "[train]\niters = 0\n[adapter]\noptions = { rank = 0, rnak = 1 }\n[evaluate]\nx = 1\n"
    )
    for words in ("'iters'", "'rank'", "'rnak'", "[evaluate] has no option 'x'"):
        assert words in message


def test_a_model_comes_from_one_place(fault: Callable[..., str], recipe: Callable[..., Recipe]) -> None:
    data = "[data]\nuse = 'files'\noptions = { path = 'rows' }\n"
    assert "[model]: wanted either torch_path or mlx_path" in fault(data)
    assert "wanted either" in fault(MINIMAL, "model.mlx_path=base")
    used = f"[model]\nmlx_path = 'base'\n{data}"
    assert "[loader] has nothing to do" in fault(f"{used}[loader]\nuse = 'pth'\n")


def test_a_model_that_is_used_as_it_is_may_be_quantized(recipe: Callable[..., Recipe]) -> None:
    data = "[data]\nuse = 'files'\noptions = { path = 'rows' }\n"
    text = f"[model]\nmlx_path = 'base'\n{data}[quantize]\nuse = 'affine'\nhead = true\n"
    asked = recipe(text).quantization
    assert asked is not None and asked.config.head and asked.choice.component.spec.name == "affine"
    assert recipe(f"[model]\nmlx_path = 'base'\n{data}").quantization is None


def test_the_dataset_builder_is_required(fault: Callable[..., str]) -> None:
    message = fault("[model]\ntorch_path = 'x'\n")
    assert "[data] use is required: the builder (there is files)" in message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[data", ""),
        ("a = 1\na = 2\n", ":2:6"),
        ("[run]\n[run]\n", ":2:5"),
        ("x = " + "[" * 100_000, ""),
        ("x = " + "9" * 5000, ""),
        ("x = !!python/object:os.system", ":1:5"),
    ],
)
def test_what_is_no_toml(fault: Callable[..., str], text: str, place: str) -> None:
    assert re.search(rf"mine\.toml{place}: is no (usable )?TOML: ", fault(text))


def test_files_that_cannot_be_read(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(UsageError, match=r"absent.toml: there is no such recipe"):
        read(tmp_path / "absent.toml", [], registry)
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "bytes.toml").write_bytes(b"a = 1\n\xff\xfe")
    (tmp_path / "long.toml").write_bytes(b"#" * (1 << 21))
    for name, says in (
        ("", "is a folder"),
        ("pipe.toml", "is a pipe or a device"),
        ("zero.toml", "is a pipe or a device"),
        ("bytes.toml", r"bytes.toml:2: is not UTF-8"),
        ("long.toml", "is larger than 1 MiB"),
        ("a\0b.toml", "there is no such recipe"),
    ):
        with pytest.raises(UsageError, match=says):
            read(tmp_path / name, [], registry)


def test_places_are_those_of_tables_and_not_of_words_in_texts(fault: Callable[..., str]) -> None:
    text = '[generate]\nprompts = ["""\ntrain = 3\n"""]\n' + MINIMAL + "[ 'train' ]\niters = 0\n"
    assert "mine.toml:12: " in fault(text)


# --- components that are not there --------------------------------------------


def test_all_missing_components_are_told_with_the_plugins_that_failed(fault: Callable[..., str]) -> None:
    text = "[model]\ntorch_path = 'x'\n[data]\nuse = 'flies'\n[adapter]\nuse = 'gone:most'\n"
    message = fault(text, kind=PluginError)
    assert "no builder 'flies' (did you mean 'files'? there is files)" in message
    assert "no adapter 'gone:most' (" in message
    assert message.count("plugin gone (gone-dist 1) failed to load: ImportError: no gone") == 1
    assert "mine.toml:3: no builder" in fault(text, "adapter.use=lora", kind=PluginError)


def test_a_name_that_two_plugins_give_needs_its_full_id(
    fault: Callable[..., str], recipe: Callable[..., Recipe]
) -> None:
    text = MINIMAL + "[adapter]\nuse = 'twin'\n"
    assert "Fix: write box:twin or other:twin" in fault(text, kind=PluginError)
    chosen = recipe(text, "adapter.use=other:twin").adapter.component
    assert chosen.id == "other:twin"


# --- --set --------------------------------------------------------------------


def test_overrides_are_sections_and_keys() -> None:
    assert overrides(["adapter.rank=1", "adapter.options.rank = 2", "train.iters=3", "data.x=a=b"]) == {
        "adapter": {"rank": " 2"},
        "train": {"iters": "3"},
        "data": {"x": "a=b"},
    }


@pytest.mark.parametrize("text", ["rank", "rank=3", "adapter.=3", "a.b.c=3", "=", "train.options.iters=3"])
def test_sets_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match=r"wanted section.key=value"):
        overrides([text])


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["adaptor.rank=1"], "--set adaptor: no such section (did you mean 'adapter'?"),
        (["adapter.rnak=1"], "mine.toml with --set: adapter 'lora' has no option 'rnak'"),
        (["adapter.rank=x"], "option 'rank': wanted a whole number, got 'x'"),
        (["data.path="], "mine.toml:5 with --set: builder 'files' option 'path': wanted a path, got ''"),
        (["quantize.head=true"], "[quantize] has head but names no component"),
        (["quantize.use=none", "quantize.head=true"], "[quantize] has head but names no component"),
        (["run.seed=4294967296"], "at most 4294967295, got 4294967296"),
    ],
)
def test_faults_of_the_command_line(fault: Callable[..., str], sets: list[str], words: str) -> None:
    assert words in fault(MINIMAL, *sets)


def test_verbs_take_their_own_sections() -> None:
    check_sections({"adapter": {}}, ("adapter", "sampler"))
    with pytest.raises(UsageError, match="did you mean 'adapter'"):
        check_sections({"adaptr": {}}, ("adapter", "sampler"))


def test_choose_is_a_component_with_checked_options(registry: Registry) -> None:
    choice, config = choose("adapter", "lora", {"rank": "3", "layers": "2"}, registry)
    assert (choice.options.rank, config.layers) == (3, 2)
    with pytest.raises(UsageError, match="adapter 'lora' option 'rank': must be at least 1"):
        choose("adapter", "lora", {"rank": 0}, registry)
    with pytest.raises(PluginError, match=r"no adapter 'lroa' .did you mean 'lora'"):
        choose("adapter", "lroa", {}, registry)


def test_reading_changes_nothing_in_the_environment(recipe: Callable[..., Recipe]) -> None:
    before = dict(os.environ), Path.cwd()
    recipe(MINIMAL)
    assert (dict(os.environ), Path.cwd()) == before
