"""Samplers in a row: which there are, whose an option is, and how a recipe keeps them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tomli_w

from mlxlora_core import plugins as registries
from mlxlora_core.errors import PluginError, UsageError
from mlxlora_core.options import option, plain
from mlxlora_core.plugins import Choice, Component, Plugin, Registry
from mlxlora_core.runs.plan import fingerprints
from mlxlora_core.runs.recipe import COMMAND_LINE, DEFAULT, Recipe, choose_samplers
from mlxlora_core.runs.recipe_source import read
from mlxlora_core.runs.samplers import chain, check_samplers
from mlxlora_core.specs import Sampler


@dataclass(frozen=True)
class OtherOptions:
    p: float = option(0.5, help="p", minimum=0)
    temp: float = option(0.7, help="temperature", minimum=0)


@pytest.fixture(scope="module")
def registry() -> Registry:
    """What is built in, and a second sampler ``top-p`` of another plugin."""
    known = registries.load(environ={registries.ALLOW_LIST: ""})
    other = Plugin("other", "other-dist", "1", "installed", "other")
    spec = Sampler(name="top-p", summary="s", options=OtherOptions, build=lambda options: None)
    return Registry([*known.plugins, other], [*known.components, Component("sampler", spec, other)])


@pytest.fixture
def recipe(tmp_path: Path, registry: Registry) -> Callable[..., Recipe]:
    """Reads a recipe with this text in it."""

    def make(text: str, *sets: str) -> Recipe:
        path = tmp_path / "mine.toml"
        head = "[model]\nmlx_path = 'm'\n[data]\nuse = 'jsonl'\noptions = { path = 'rows' }\n"
        path.write_text(head + text, "utf-8")
        return read(path, sets, registry)

    return make


def chosen(choices: tuple[Choice, ...]) -> list[tuple[str, dict[str, Any]]]:
    """(full id, options) of each."""
    return [(choice.component.id if choice.component else "", plain(choice.options)) for choice in choices]


PENALTY = ("samplers:repetition-penalty", {"penalty": 1.2, "window": None})


# --- settings of their own ----------------------------------------------------

ALL = {
    "min_p": 0.1,
    "top_p": 0.8,
    "top_k": 5,
    "frequency_penalty": 0.3,
    "presence_penalty": -0.4,
    "repetition_penalty": 1.5,
}
IN_ORDER = "repetition-penalty,presence-penalty,frequency-penalty,top-k,top-p,min-p"


@pytest.mark.parametrize(
    ("settings", "use"),
    [
        ({}, "temperature"),
        ({"top_p": None, "presence_penalty": None}, "temperature"),
        ({"top_p": 0.5}, "top-p"),
        ({"presence_penalty": 1}, "presence-penalty,temperature"),
        ({"min_p": 0, "top_k": 3}, "top-k,min-p"),
        (ALL, IN_ORDER),
    ],
)
def test_settings_ask_for_samplers_in_one_order(settings: dict[str, Any], use: str) -> None:
    assert chain(None, settings)[0] == use


def test_settings_are_options_of_their_samplers_and_only_the_first_heats(registry: Registry) -> None:
    use, values = chain(None, ALL)
    use = use.replace("top-p", "samplers:top-p")  # another plugin has one, too
    got = chosen(choose_samplers(use, {**values, "temp": "0.5"}, registry))
    assert got == [
        ("samplers:repetition-penalty", {"penalty": 1.5, "window": None}),
        ("samplers:presence-penalty", {"penalty": -0.4, "window": None}),
        ("samplers:frequency-penalty", {"penalty": 0.3, "window": None}),
        ("samplers:top-k", {"temp": 0.5, "k": 5}),
        ("samplers:top-p", {"temp": 1.0, "p": 0.8}),
        ("samplers:min-p", {"temp": 1.0, "p": 0.1}),
    ]


def test_their_chain_is_that_of_numpy_in_float64(registry: Registry) -> None:
    """Penalties of the logits, then the temperature, then what each leaves of the rest, made whole again."""
    use, values = chain(None, ALL)
    choices = choose_samplers(use.replace("top-p", "samplers:top-p"), {**values, "temp": 0.7}, registry)
    draw = np.random.default_rng(8)
    for _ in range(50):
        row, tokens = draw.normal(0, 2, 30), tuple(draw.integers(0, 30, 12).tolist())
        logits = mx.array(row[None].astype(np.float32))
        for choice in choices:
            assert choice.component is not None
            logits = choice.component.spec.build(choice.options)(logits, tokens)
        got = np.exp(np.array(logits, dtype=np.float64)[0])
        np.testing.assert_allclose(got / got.sum(), by_hand(row, tokens), rtol=1e-4, atol=1e-6)


def by_hand(row: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    """The probabilities (V,) of :data:`ALL` at temperature 0.7, float64."""
    times = np.bincount(tokens, minlength=row.size)
    row = np.where(times > 0, np.where(row > 0, row / 1.5, row * 1.5), row)
    row = (row + 0.4 * (times > 0) - 0.3 * times) / 0.7
    chances = np.exp(row - row.max())
    order = np.argsort(-chances)
    chances[order[5:]] = 0
    chances /= chances.sum()
    reached = np.cumsum(chances[order]) >= 0.8
    chances[order[int(np.argmax(reached)) + 1 :]] = 0
    chances[chances < 0.1 * chances.max()] = 0
    return np.asarray(chances / chances.sum())


def test_beside_names_a_setting_is_an_option_of_one_of_them() -> None:
    use = "repetition-penalty,samplers:top-p"
    assert chain(use, {"top_p": "0.5"}) == (use, {"top-p.p": "0.5"})
    with pytest.raises(UsageError, match=r"--min-p belongs to the sampler min-p, but --sampler names top-p"):
        chain("top-p", {"top_p": "0.5", "min_p": "0.1"}, lambda name: "--" + name.replace("_", "-"))


# --- on the command line ------------------------------------------------------


def test_one_sampler_is_what_it_was(registry: Registry) -> None:
    assert chosen(choose_samplers("temperature", {}, registry)) == [("samplers:temperature", {"temp": 0.8})]
    got = choose_samplers("min-p", {"temp": "0", "min-p.p": "0.2"}, registry)
    assert chosen(got) == [("samplers:min-p", {"temp": 0.0, "p": 0.2})]


def test_several_stand_in_the_order_in_which_they_are_named(registry: Registry) -> None:
    got = choose_samplers("repetition-penalty, min-p", {"penalty": "1.5", "p": "0.2", "temp": "1"}, registry)
    assert chosen(got) == [
        ("samplers:repetition-penalty", {"penalty": 1.5, "window": None}),
        ("samplers:min-p", {"temp": 1.0, "p": 0.2}),
    ]
    turned = choose_samplers("min-p,repetition-penalty", {}, registry)
    assert [name for name, _ in chosen(turned)] == ["samplers:min-p", "samplers:repetition-penalty"]


def test_logits_are_heated_once(registry: Registry) -> None:
    """By the first that has a temperature; another one's is 1 unless it is said."""
    temps = {
        None: [0.8, 1.0],
        "temp": [0.3, 1.0],
        "min-p.temp": [0.8, 0.3],
        "top-k.temp": [0.3, 1.0],
    }
    for key, want in temps.items():
        got = choose_samplers("repetition-penalty,top-k,min-p", {key: "0.3"} if key else {}, registry)
        assert [options["temp"] for _, options in chosen(got)[1:]] == want, key


def test_an_option_that_several_have_names_its_sampler(registry: Registry) -> None:
    names = "min-p,samplers:top-p"
    got = choose_samplers(names, {"min-p.p": "0.2", "top-p.p": "0.7"}, registry)
    assert [options["p"] for _, options in chosen(got)] == [0.2, 0.7]
    with pytest.raises(UsageError, match=r"several samplers have an option 'p'; write min-p\.p or top-p\.p"):
        choose_samplers(names, {"p": "0.2"}, registry)


def test_samplers_of_one_name_go_by_their_full_id(registry: Registry) -> None:
    names = "samplers:top-p,other:top-p"
    values = {"samplers:top-p.p": "0.2", "other:top-p.p": "0.3"}
    assert [options["p"] for _, options in chosen(choose_samplers(names, values, registry))] == [0.2, 0.3]
    with pytest.raises(UsageError, match=r"write samplers:top-p\.p or other:top-p\.p"):
        choose_samplers(names, {"top-p.p": "0.2"}, registry)


@pytest.mark.parametrize(
    ("use", "values", "words"),
    [
        ("", {}, "wanted a sampler, got ''"),
        ("greedy,greedy", {}, "sampler 'greedy' is named twice"),
        (
            "min-p,top-k",
            {"kk": "1", "w": "2"},
            "have no option 'kk' (did you mean 'k'? they have k, p, temp); ",
        ),
        ("greedy", {"temp": "1"}, "sampler 'greedy' has no option 'temp'"),
        ("greedy,top-k", {"mip-p.p": "1"}, "no sampler 'mip-p' here (there is greedy, top-k)"),
        ("greedy,min-p", {"greedy.p": "1"}, "sampler 'greedy' has no option 'p'"),
        ("greedy,min-p", {"p": "2"}, "sampler 'min-p' option 'p': must be at least 0 and at most 1, got 2.0"),
    ],
)
def test_what_makes_no_sense(registry: Registry, use: str, values: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_samplers(use, values, registry)
    assert words in str(caught.value)


def test_names_that_are_not_there_are_all_told(registry: Registry) -> None:
    with pytest.raises(PluginError, match=r"no sampler 'gredy'.*no sampler 'mip-p'"):
        choose_samplers("gredy,top-k,mip-p", {}, registry)


# --- in a recipe --------------------------------------------------------------

CHAIN = '[sampler]\nuse = ["repetition-penalty", "samplers:top-p", "min-p"]\n'


def test_a_list_and_options_in_either_form(recipe: Callable[..., Recipe]) -> None:
    want = [
        ("samplers:repetition-penalty", {"penalty": 1.5, "window": None}),
        ("samplers:top-p", {"temp": 0.5, "p": 0.7}),
        ("samplers:min-p", {"temp": 1.0, "p": 0.05}),
    ]
    tables = "[sampler.options]\npenalty = 1.5\ntemp = 0.5\n[sampler.options.top-p]\np = 0.7\n"
    dotted = "options = { penalty = 1.5, temp = 0.5, top-p.p = 0.7 }\n"
    quoted = 'options = { penalty = 1.5, "top-p.temp" = 0.5, "top-p.p" = 0.7 }\n'
    for options in (tables, dotted, quoted):
        assert chosen(recipe(CHAIN + options).sampler) == want


def test_the_command_line_is_over_it(recipe: Callable[..., Recipe]) -> None:
    text = CHAIN + "options = { penalty = 1.5, top-p.p = 0.7 }\n"
    got = recipe(text, "sampler.top-p.p=0.6", "sampler.options.min-p.p=0.1", "sampler.temp=0")
    assert [options for _, options in chosen(got.sampler)] == [
        {"penalty": 1.5, "window": None},
        {"temp": 0.0, "p": 0.6},
        {"temp": 1.0, "p": 0.1},
    ]
    origins = {
        "sampler.use": "mine.toml",
        "sampler.repetition-penalty.penalty": "mine.toml",
        "sampler.repetition-penalty.window": DEFAULT,
        "sampler.top-p.p": COMMAND_LINE,
        "sampler.top-p.temp": COMMAND_LINE,
        "sampler.min-p.temp": DEFAULT,
    }
    assert {name: got.origins[name] for name in origins} == origins


def test_options_of_replaced_samplers_go_with_them(recipe: Callable[..., Recipe]) -> None:
    text = CHAIN + "options = { penalty = 1.5 }\n"
    assert chosen(recipe(text, "sampler.use=repetition-penalty").sampler) == [PENALTY]
    assert chosen(recipe(text, "sampler.use=greedy,repetition-penalty").sampler)[1] == PENALTY


def test_what_is_written_down_reads_back_the_same(
    recipe: Callable[..., Recipe], registry: Registry, tmp_path: Path
) -> None:
    for use in ('["samplers:top-p", "other:top-p", "greedy"]', '["min-p"]', '"min-p"', '"min-p,top-k"'):
        got = recipe(f"[sampler]\nuse = {use}\n")
        path = tmp_path / "written.toml"
        path.write_text(tomli_w.dumps(got.values()), "utf-8")
        assert read(path, [], registry).sampler == got.sampler
        values = got.values()["sampler"]
        assert all(f"sampler.{key}" in got.origins for key in values["options"])
        assert len(got.sampler) > 1 or isinstance(values["use"], str)


def test_other_samplers_are_another_stage(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    for name in ("rows", "m"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": "a"}\n')
    marks = [
        fingerprints(recipe(f"[sampler]\nuse = {use}\n"))
        for use in ('["greedy"]', '["greedy", "min-p"]', '["min-p", "greedy"]')
    ]
    assert len({mark["before"] for mark in marks}) == 3
    assert len({mark["train"] for mark in marks}) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("use = []\n", "[sampler] use is required: the sampler (there is "),
        ("use = [3]\n", "[sampler] use: wanted text or a list of texts, got [3]"),
        ("use = ['min-p', 'samplers:top-p']\noptions = { p = 1 }\n", "several samplers have an option 'p'"),
        ("use = ['greedy', 'greedy']\n", "mine.toml:6: sampler 'greedy' is named twice"),
    ],
)
def test_faults_have_a_place(recipe: Callable[..., Recipe], text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe("[sampler]\n" + text)
    assert words in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_samplers_are_built_once_the_tokenizer_that_they_ask_for_is_there() -> None:
    seen: list[Any] = []

    def build(options: Any) -> Any:
        seen.append("plain")
        return lambda logits, tokens: logits

    def asking(options: Any, tokenizer: Any) -> Any:
        seen.append(tokenizer)
        return 3

    plugin = Plugin("box", "box", "1", "installed", "box")
    choices = [
        Choice(Component("sampler", Sampler(name="s", summary="s", build=function), plugin), None)
        for function in (build, asking)
    ]
    check_samplers(choices)
    assert seen == ["plain"]
    tokenizer: Any = object()
    with pytest.raises(PluginError, match="sampler box:s: build gives int, wanted a function"):
        check_samplers(choices, tokenizer)
    assert seen == ["plain", tokenizer]
