"""The registry: discovery, selection, isolation and names, over distributions made on the spot."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import plugins as registry
from mlxlora_core import specs
from mlxlora_core.errors import PluginError, ResourceError, UsageError
from mlxlora_core.machine import device
from mlxlora_core.options import explain
from mlxlora_core.plugins import ALLOW_LIST, Component, Plugin, Registry, load, start_runtimes
from mlxlora_core.plugins.checks import FUNCTIONS, check_call
from mlxlora_core.runtime_started import RuntimeStarted

HEAD = """
from dataclasses import dataclass
from mlxlora_core.api import *
def build(options): return lambda logits, tokens, key: logits
"""
SAMPLER = (
    HEAD
    + """
@hookimpl
def mlxlora_samplers():
    return [Sampler(name={name!r}, summary="a sampler", build=build)]
"""
)


class Shelf:
    """A folder on the path that holds distributions, as pip would have left them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self, distribution: str, code: str | None, *, entry: str = "", module: str = "", metadata: bool = True
    ) -> str:
        """Install one distribution with one module; returns the name of the module."""
        module = module or f"shelf_{distribution.replace('-', '_')}"
        if code is not None:
            (self.folder / f"{module}.py").write_text(textwrap.dedent(code))
        self.entries(distribution, f"[mlxlora]\n{entry or distribution} = {module}\n", metadata=metadata)
        return module

    def entries(self, distribution: str, text: str, *, metadata: bool = True) -> None:
        """The metadata of a distribution with ``text`` for entry_points.txt."""
        info = self.folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(text)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    """Only what a test adds and what is installed here; modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield Shelf(tmp_path)
    for name in [n for n in sys.modules if n.startswith(("shelf_", "mlxlora_file_"))]:
        del sys.modules[name]


def plugin(found: Registry, name: str) -> Plugin:
    (one,) = [p for p in found.plugins if p.name == name and p.origin != "built-in"]
    return one


# --- discovery ----------------------------------------------------------------


def test_built_in_and_installed_plugins_come_through_one_door(shelf: Shelf) -> None:
    shelf.add("other-samplers", SAMPLER.format(name="best"))
    found = load(environ={})
    assert [p.origin for p in found.plugins] == sorted(p.origin for p in found.plugins)
    one = plugin(found, "other-samplers")
    assert (one.distribution, one.version, one.origin, one.status) == (
        "other-samplers",
        "1.2",
        "installed",
        "active",
    )
    assert one.components == (("sampler", "best"),)
    assert str(one) == "other-samplers (other-samplers 1.2)"
    assert found.find("sampler", "best").id == "other-samplers:best"
    assert found.find("sampler", "greedy").plugin.origin == "built-in"


def test_order_does_not_depend_on_the_path(shelf: Shelf) -> None:
    for name in ("zz", "aa", "mm"):
        shelf.add(name, SAMPLER.format(name=name))
    found = load(environ={})
    assert [p.name for p in found.plugins if p.name in ("zz", "aa", "mm")] == ["aa", "mm", "zz"]


def test_a_distribution_seen_twice_on_the_path_is_one_plugin(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.add("other", SAMPLER.format(name="best"))
    monkeypatch.syspath_prepend(str(tmp_path) + "/.")
    assert len([p for p in load(environ={}).plugins if p.name == "other"]) == 1


def test_what_an_interrupted_pip_left_behind_is_no_second_plugin(shelf: Shelf) -> None:
    shelf.add("other", SAMPLER.format(name="best"))
    shutil.copytree(shelf.folder / "other-1.2.dist-info", shelf.folder / "~ther-1.2.dist-info")
    assert len([p for p in load(environ={}).plugins if p.name == "other"]) == 1


def test_damaged_metadata_of_a_stranger_takes_nobody_along(shelf: Shelf) -> None:
    shelf.add("other", SAMPLER.format(name="best"))
    shelf.entries("stranger", "[console_scripts]\nthis line is no entry point\n")
    shelf.entries("ours", "[mlxlora]\nneither is this one\n")
    found = load(environ={})
    assert plugin(found, "other").status == "active"
    assert plugin(found, "ours").status == "error"
    assert "entry_points.txt cannot be read" in plugin(found, "ours").reason
    assert found.of("adapter"), "the built-in plugins are still there"


def test_a_shadowed_distribution_stays_shadowed_beside_damaged_metadata(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.entries("stranger", "[console_scripts]\nthis line is no entry point\n")
    (tmp_path / "first").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "first")
    Shelf(tmp_path / "first").add("other", SAMPLER.format(name="best"), entry="new")
    shelf.add("other", SAMPLER.format(name="worst"), entry="old")
    assert [p.name for p in load(environ={}).plugins if p.distribution == "other"] == ["new"]


def test_a_distribution_without_metadata(shelf: Shelf) -> None:
    shelf.add("nameless", SAMPLER.format(name="best"), metadata=False)
    found = load(environ={})
    assert plugin(found, "nameless").distribution == "unknown"
    assert found.find("sampler", "best").id == "nameless:best"


# --- isolation ----------------------------------------------------------------

BROKEN = {
    "import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module"),
    "syntax": ("def (:", "SyntaxError: invalid syntax"),
    "exit": ("import sys; sys.exit(3)", "it called sys.exit(3)"),
    "exit with words": ("raise SystemExit('bye\\nbye')", "it called sys.exit('bye"),
    "base exception": ("class Gone(BaseException): pass\nraise Gone('away')", "Gone: away"),
    "unspeakable": (
        "class Mute(Exception):\n def __str__(self): raise RuntimeError\nraise Mute",
        "Mute: (its message cannot be shown)",
    ),
    "control characters": ("raise ValueError('\\x1b[2J\\rmlxlora: all is well')", "ValueError: \\x1b[2J"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "hook raises": ("@hookimpl\ndef mlxlora_samplers(): 1 / 0", "ZeroDivisionError: division by zero"),
    "hook exits": ("@hookimpl\ndef mlxlora_samplers(): raise SystemExit", "it called sys.exit(None)"),
    "signature": (
        "@hookimpl\ndef mlxlora_samplers(config): return []",
        "Argument(s) {'config'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "unknown hook": (
        "@hookimpl\ndef mlxlora_sampler(): return []",
        "unknown hook 'mlxlora_sampler' (did you mean 'mlxlora_samplers'?",
    ),
    "unmarked hook": ("def mlxlora_samplers(): return []", "mlxlora_samplers lacks @hookimpl"),
    "no hook": ("x = 1", "it implements no hook"),
    "api": ("mlxlora_api = 99\n@hookimpl\ndef mlxlora_samplers(): return []", "it needs plugin API 99"),
    "none": ("@hookimpl\ndef mlxlora_samplers(): pass", "gives NoneType, wanted an iterable of specs"),
    "text": ("@hookimpl\ndef mlxlora_samplers(): return 'greedy'", "gives str, wanted an iterable"),
    "another kind": (
        "@hookimpl\ndef mlxlora_samplers():\n"
        " return [Adapter(name='a', summary='s', wrap=lambda a, b, c: a, fuse=lambda a, b: b)]",
        "mlxlora_samplers gives Adapter, wanted Sampler",
    ),
    "midway": (
        "@hookimpl\ndef mlxlora_samplers():\n"
        " yield Sampler(name='good', summary='s', build=build)\n raise OSError('gone')",
        "OSError: gone",
    ),
    "twice": (
        "@hookimpl\ndef mlxlora_samplers():\n return 2 * [Sampler(name='a', summary='s', build=build)]",
        "mlxlora_samplers gives 'a' twice",
    ),
    "later hook": (
        "@hookimpl\ndef mlxlora_adapters():\n"
        " return [Adapter(name='good', summary='s', wrap=lambda a, b, c: a, fuse=lambda a, b: b)]\n"
        "@hookimpl\ndef mlxlora_samplers(): raise OSError('gone')",
        "OSError: gone",
    ),
}
SPECS = {
    "name": ("Sampler(name='Top K', summary='s', build=build)", "name 'Top K' does not match"),
    "name with a newline": ("Sampler(name='a\\n', summary='s', build=build)", "name 'a\\n' does not match"),
    "name none": ("Sampler(name='none', summary='s', build=build)", "or is 'none'"),
    "name of no text": ("Sampler(name=3, summary='s', build=build)", "name 3 does not match"),
    "summary": ("Sampler(name='a', summary=None, build=build)", "summary of 'a' must be text, got None"),
    "no function": ("Sampler(name='a', summary='s', build=3)", "build of 'a' must be a function, got 3"),
    "arguments": (
        "Sampler(name='a', summary='s', build=lambda: None)",
        "build of 'a' takes (), wanted (options)",
    ),
    "more arguments": (
        "Sampler(name='a', summary='s', build=lambda x, y: None)",
        "build of 'a' takes (x, y), wanted (options)",
    ),
    "options": ("Sampler(name='a', summary='s', build=build, options=dict)", "options of 'a' must be a data"),
    "options instance": (
        "Sampler(name='a', summary='s', build=build, options=NoOptions())",
        "options of 'a' must be a dataclass",
    ),
    "reserved option": (
        "Sampler(name='a', summary='s', build=build, options=Reserved)",
        "cannot have an option 'use'",
    ),
    "unresolved option": (
        "Sampler(name='a', summary='s', build=build, options=Unresolved)",
        "options of 'a' cannot be used: NameError: name 'Missing' is not defined",
    ),
    "default": (
        "Sampler(name='a', summary='s', build=build, options=Default)",
        "options of 'a' has a wrong default for 'k': must be at least 1, got 0",
    ),
}
QUANTIZER = "Quantizer(name='a', summary='s', quantize=lambda w, o: {{}}, dequantize=lambda p, o: 0, {})"
SPECS |= {
    "no parts": (QUANTIZER.format("parts=()"), "parts of 'a' are (), wanted different names"),
    "parts twice": (QUANTIZER.format("parts=('q', 'q')"), "parts of 'a' are ('q', 'q'), wanted different"),
    "a part with a dot": (QUANTIZER.format("parts=('q.r',)"), "wanted different names without a dot"),
    "a part called bias": (QUANTIZER.format("parts=('bias',)"), "and none of them 'bias'"),
    "parts of another type": (QUANTIZER.format("parts=['q']"), "parts of 'a' must be a tuple of texts"),
    "a product that is none": (
        QUANTIZER.format("parts=('q',), matmul=3"),
        "matmul of 'a' must be a function, got 3",
    ),
    "a product of two": (
        QUANTIZER.format("parts=('q',), matmul=lambda x, parts: x"),
        "matmul of 'a' takes (x, parts), wanted (x, parts, options)",
    ),
    "a reserved key of the section": (
        "Adapter(name='a', summary='s', wrap=lambda a, b, c: a, fuse=lambda a, b: b, options=Layered)",
        "'a' cannot have an option 'layers', recipes use that word",
    ),
}
CLASSES = """
@dataclass(frozen=True)
class Layered:
    layers: int = option(1, help="x")
@dataclass(frozen=True)
class Reserved:
    use: int = option(1, help="x")
@dataclass(frozen=True)
class Unresolved:
    k: "Missing" = option(1, help="x")
@dataclass(frozen=True)
class Default:
    k: int = option(0, help="x", minimum=1)
"""


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_fails_takes_nobody_along(shelf: Shelf, case: str) -> None:
    code, reason = BROKEN[case]
    shelf.add("broken", HEAD + code)
    shelf.add("other", SAMPLER.format(name="best"))
    check_isolated(load(environ={}), reason)


@pytest.mark.parametrize("case", SPECS)
def test_a_spec_that_would_fail_later_is_refused_at_once(shelf: Shelf, case: str) -> None:
    code, reason = SPECS[case]
    hook = "mlxlora_" + code.partition("(")[0].lower() + "s"
    shelf.add("broken", f"{HEAD}{CLASSES}@hookimpl\ndef {hook}(): return [{code}]")
    shelf.add("other", SAMPLER.format(name="best"))
    check_isolated(load(environ={}), reason)


def check_isolated(found: Registry, reason: str) -> None:
    broken = plugin(found, "broken")
    assert broken.status == "error"
    assert reason in broken.reason
    assert broken.reason.isprintable()
    assert broken.components == ()
    assert broken.fault is not None
    assert all(c.plugin.name != "broken" for c in found.components)
    assert broken in found.failed
    assert found.find("sampler", "best").plugin.name == "other"
    assert found.find("sampler", "greedy")


@pytest.mark.parametrize("value", ["shelf_absent", "shelf_there:absent", "not a module!", ""])
def test_entry_points_to_nothing(shelf: Shelf, value: str) -> None:
    (shelf.folder / "shelf_there.py").write_text("")
    shelf.entries("broken", f"[mlxlora]\nbroken = {value}\n")
    assert plugin(load(environ={}), "broken").status == "error"


def test_interrupting_is_not_a_plugin_that_fails(shelf: Shelf) -> None:
    shelf.add("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load(environ={})


def test_what_a_plugin_prints_goes_to_stderr(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    shelf.add("chatty", "print('hello')\n" + SAMPLER.format(name="best"))
    assert plugin(load(environ={}), "chatty").status == "active"
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")


def test_an_optional_hook_is_one_that_this_version_may_lack(shelf: Shelf) -> None:
    later = "\n@hookimpl(optionalhook=True)\ndef mlxlora_dreams(): return []\n"
    shelf.add("later", SAMPLER.format(name="best") + later)
    assert plugin(load(environ={}), "later").components == (("sampler", "best"),)


def test_specs_may_be_subclassed_and_come_from_a_generator_or_an_object(shelf: Shelf) -> None:
    shelf.add(
        "objects",
        HEAD
        + """
@dataclass(frozen=True, kw_only=True)
class Mine(Sampler):
    extra: int = 0
class Door:
    @hookimpl
    def mlxlora_samplers(self):
        yield Mine(name="mine", summary="s", build=build)
door = Door()
""",
        module="shelf_objects",
    )
    info = next(shelf.folder.glob("objects-*"))
    (info / "entry_points.txt").write_text("[mlxlora]\nobjects = shelf_objects:door\n")
    assert plugin(load(environ={}), "objects").components == (("sampler", "mine"),)


# --- calls --------------------------------------------------------------------


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_table_of_functions_says_what_the_specs_say(kind: str) -> None:
    """As many arguments as each annotation has, read here by the parser of Python."""
    wanted = {}
    for field in dataclasses.fields(registry.KINDS[kind][1]):
        call = ast.parse(str(field.type), mode="eval").body
        call = call.left if isinstance(call, ast.BinOp) else call  # Callable[...] | None
        if isinstance(call, ast.Subscript) and ast.unparse(call.value) == "Callable":
            assert isinstance(call.slice, ast.Tuple) and isinstance(call.slice.elts[0], ast.List)
            wanted[field.name] = len(call.slice.elts[0].elts)
    assert {name: len(arguments) for name, arguments in FUNCTIONS[kind].items()} == wanted


RAISING = """
import sys
class Odd(BaseException): pass
def build(options): {body}
@hookimpl
def mlxlora_samplers(): return [Sampler(name="bad", summary="s", build={function})]
"""


@pytest.mark.parametrize(
    ("body", "function", "reason"),
    [
        ("1 / 0", "build", "ZeroDivisionError: division by zero"),
        ("sys.exit(0)", "build", "it called sys.exit(0)"),
        ("raise Odd('a\\x1bb')", "build", "Odd: a\\x1bb"),
        ("pass", "int", "TypeError: int() argument must be"),
    ],
)
def test_whatever_a_function_raises_is_an_error_that_names_it(
    shelf: Shelf, body: str, function: str, reason: str
) -> None:
    shelf.add("bad", HEAD + RAISING.format(body=body, function=function))
    component = load(environ={}).find("sampler", "bad")
    with pytest.raises(PluginError) as caught:
        component.spec.build(specs.NoOptions())
    message = str(caught.value)
    assert f"plugin bad (bad 1.2) failed in build of sampler 'bad': {reason}" in message
    assert message.startswith(str(shelf.folder / "shelf_bad.py:")) == (function == "build")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("raise KeyboardInterrupt", KeyboardInterrupt),
        ("raise UsageError('no')", UsageError),
        ("raise MemoryError", ResourceError),
    ],
)
def test_what_is_no_fault_of_a_plugin_passes(shelf: Shelf, body: str, kind: type[BaseException]) -> None:
    shelf.add("bad", HEAD + RAISING.format(body=body, function="build"))
    with pytest.raises(kind):
        load(environ={}).find("sampler", "bad").spec.build(specs.NoOptions())


def test_a_defect_of_a_built_in_plugin_is_not_blamed_on_a_plugin() -> None:
    find = load(environ={ALLOW_LIST: ""}).find
    with pytest.raises(AttributeError):
        find("sampler", "top-k").spec.build(None)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (None, "NoneType"),
        (3, "int"),
        (lambda: None, "a function ()"),
        (lambda logits, tokens, key: None, "a function (logits, tokens, key)"),
    ],
)
def test_a_function_that_a_function_gives_is_checked(given: object, got: str) -> None:
    component = load(environ={ALLOW_LIST: ""}).find("sampler", "greedy")
    with pytest.raises(PluginError) as caught:
        check_call(component, "build", given, "logits", "tokens")
    want = f"sampler samplers:greedy: build gives {got}, wanted a function (logits, tokens)"
    assert str(caught.value) == want


@pytest.mark.parametrize("given", [lambda a, b: None, lambda *all: None, lambda a, b, c=1: None, max, dict])
def test_a_function_that_can_be_called_so_is_given_back(given: object) -> None:
    component = load(environ={ALLOW_LIST: ""}).find("sampler", "greedy")
    assert check_call(component, "build", given, "logits", "tokens") is given


@pytest.mark.parametrize(
    ("takes", "said"),
    [
        ("(options)", ""),
        ("(options, tokenizer)", ""),
        ("(options, tokenizer=None)", ""),
        ("(options, words)", "takes (options, words), wanted (options)"),
        ("(options, *, tokenizer)", "takes (options, *, tokenizer), wanted (options, tokenizer)"),
        ("(options, tokenizer, seed)", "takes (options, tokenizer, seed), wanted (options, tokenizer)"),
    ],
)
def test_a_sampler_asks_for_the_tokenizer_by_the_name_of_a_parameter(
    shelf: Shelf, takes: str, said: str
) -> None:
    shelf.add("asks", HEAD + RAISING.format(body="pass", function="build").replace("(options)", takes))
    reason = plugin(load(environ={}), "asks").reason
    assert said in reason and bool(said) == bool(reason)


# --- names --------------------------------------------------------------------


def test_a_name_that_is_not_there_tells_what_there_is_and_what_failed(shelf: Shelf) -> None:
    shelf.add("broken", "import no_such_module_anywhere")
    shelf.add("quiet", SAMPLER.format(name="best"))
    found = load(["no:quiet"], environ={})
    with pytest.raises(PluginError) as caught:
        found.find("sampler", "gredy")
    message = str(caught.value)
    assert caught.value.exit_code == 8
    for words in (
        "no sampler 'gredy' (did you mean 'greedy'? there is frequency-penalty, greedy,",
        "plugin broken (broken 1.2) failed to load: ModuleNotFoundError",
        "plugin quiet (quiet 1.2) is disabled (-P no:quiet)",
        "mlxlora components sampler",
    ):
        assert words in message
    assert message.isprintable()


def test_a_full_id_that_is_not_there_tells_of_its_own_plugin_alone(shelf: Shelf) -> None:
    shelf.add("broken", "import no_such_module_anywhere")
    shelf.add("quiet", SAMPLER.format(name="best"))
    with pytest.raises(PluginError) as caught:
        load(["no:quiet"], environ={}).find("sampler", "quiet:best")
    assert "plugin quiet (quiet 1.2) is disabled" in str(caught.value)
    assert "broken" not in str(caught.value)


def test_all_that_is_missing_is_told_at_once(shelf: Shelf) -> None:
    shelf.add("broken", "import no_such_module_anywhere")
    with pytest.raises(PluginError) as caught:
        load(environ={}).find_all([("sampler", "best"), ("sampler", "greedy"), ("adapter", "most")])
    message = str(caught.value)
    assert "no sampler 'best'" in message
    assert "no adapter 'most'" in message
    assert "greedy'" not in message
    assert message.count("no_such_module_anywhere") == 1


def test_one_name_from_two_plugins_is_an_error_only_when_it_is_asked_for(shelf: Shelf) -> None:
    shelf.add("other", SAMPLER.format(name="greedy"))
    found = load(environ={})
    assert len([c for c in found.of("sampler") if c.spec.name == "greedy"]) == 2
    assert found.find("sampler", "top-k")
    with pytest.raises(PluginError) as caught:
        found.find("sampler", "greedy")
    message = str(caught.value)
    assert "samplers (mlxlora " in message
    assert "other (other 1.2) as other:greedy" in message
    assert "Fix: write samplers:greedy or other:greedy" in message
    assert found.find("sampler", "other:greedy").plugin.name == "other"
    assert found.find("sampler", "samplers:greedy").plugin.origin == "built-in"


def test_every_full_id_stands_for_one_component(shelf: Shelf) -> None:
    # Two distributions with one entry-point name, one of them named like that entry point,
    # and a third that is named like it and calls its entry point otherwise.
    shelf.add("twin", SAMPLER.format(name="best"), module="shelf_a", entry="twin")
    shelf.add("sister", SAMPLER.format(name="best"), module="shelf_b", entry="twin")
    shelf.add("best", SAMPLER.format(name="best"), module="shelf_c", entry="sister")
    found = load(environ={})
    mine = [c for c in found.of("sampler") if c.spec.name == "best"]
    assert len({c.id for c in mine}) == 3
    for component in mine:
        assert found.find("sampler", component.id) is component
    with pytest.raises(PluginError, match="is given by"):
        found.find("sampler", "best")


def test_ids_are_the_same_however_names_are_spelt(shelf: Shelf) -> None:
    shelf.add("My_Samplers", SAMPLER.format(name="best"), module="shelf_mine", entry="my.samplers")
    found = load(environ={})
    for owner in ("my.samplers", "my-samplers", "My_Samplers", "MY--SAMPLERS"):
        assert found.find("sampler", f"{owner}:best").spec.name == "best"


def test_one_module_from_two_distributions_is_there_twice(shelf: Shelf) -> None:
    shelf.add("old-name", SAMPLER.format(name="best"), module="shelf_moved")
    shelf.add("new-name", None, module="shelf_moved")
    found = load(environ={})
    assert [plugin(found, n).status for n in ("old-name", "new-name")] == ["active", "active"]
    assert found.find("sampler", "new-name:best").plugin.name == "new-name"


# --- selection ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "select", "status"),
    [
        ({}, [], "active"),
        ({ALLOW_LIST: ""}, [], "not selected"),
        ({ALLOW_LIST: " , "}, [], "not selected"),
        ({ALLOW_LIST: "samplers"}, [], "not selected"),
        ({ALLOW_LIST: "samplers, OTHER"}, [], "active"),
        ({ALLOW_LIST: "other-dist"}, [], "active"),
        ({ALLOW_LIST: ""}, ["other"], "active"),
        ({}, ["other_dist"], "active"),
        ({}, ["no:other"], "disabled"),
        ({}, ["no:other-dist"], "disabled"),
        ({ALLOW_LIST: "other"}, ["no:other"], "disabled"),
    ],
)
def test_selection(shelf: Shelf, environ: dict[str, str], select: list[str], status: str) -> None:
    shelf.add("other-dist", SAMPLER.format(name="best"), entry="other", module="shelf_chosen")
    found = load(select, environ)
    assert plugin(found, "other").status == status
    assert bool(plugin(found, "other").reason) == (status != "active")
    assert ("shelf_chosen" in sys.modules) == (status == "active"), "what is not chosen is not imported"
    assert found.find("sampler", "greedy").plugin.origin == "built-in"


def test_the_allow_list_names_plugins_that_are_there(shelf: Shelf) -> None:
    shelf.add("other-dist", SAMPLER.format(name="best"), entry="other", module="shelf_listed")
    environ = {ALLOW_LIST: "othr, mlxlora, other-dits,other"}
    with pytest.raises(PluginError) as caught:
        load(environ=environ)
    message = str(caught.value)
    assert f"{ALLOW_LIST} names no plugin: 'othr', 'other-dits' (did you mean 'other'?" in message
    assert "did you mean 'other-dist'?" in message and "there is affine, " in message
    assert caught.value.exit_code == 8
    assert "shelf_listed" not in sys.modules, "it is told before anything is imported"
    found = load(environ=environ, tolerant=True)
    assert found.warnings == (caught.value.what,)
    assert plugin(found, "other").status == "active"
    assert load(environ={ALLOW_LIST: "other"}).warnings == ()


def test_built_in_plugins_can_be_left_out_one_by_one_or_all(shelf: Shelf) -> None:
    assert not load(["no:samplers"], {}).of("sampler")
    assert load(["no:samplers"], {}).of("adapter")
    assert not load(["no:mlxlora"], {ALLOW_LIST: ""}).components


def test_names_after_P_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match=r"-P names no plugin: 'sampler' .did you mean 'samplers'"):
        load(["sampler"], {})
    with pytest.raises(UsageError, match="-P names no plugin: 'sampler'"):
        load(["no:sampler"], {})
    with pytest.raises(UsageError, match="-P samplers: it is left out by -P no: as well"):
        load(["samplers", "no:samplers"], {})


def test_a_required_plugin_that_fails_stops_everything(shelf: Shelf) -> None:
    shelf.add("broken", "import no_such_module_anywhere")
    with pytest.raises(PluginError, match=r"plugin broken .broken 1.2. failed to load: ModuleNotFoundError"):
        load(["broken"], {})


# --- files --------------------------------------------------------------------


def test_files_are_plugins_too(shelf: Shelf, tmp_path: Path) -> None:
    for folder, name in (("a", "one"), ("b", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(SAMPLER.format(name=name))
    files = [str(tmp_path / "a" / "same.py"), str(tmp_path / "b" / "same.py")]
    found = load(files, {ALLOW_LIST: ""})
    assert [p.status for p in found.plugins if p.origin == "file"] == ["active", "active"]
    assert found.find("sampler", "one").id == "same:one"
    assert found.find("sampler", "two").id == "same:two"
    assert str(found.find("sampler", "one").plugin) == "same (file)"


def test_two_files_of_one_name_do_not_see_each_other(shelf: Shelf, tmp_path: Path) -> None:
    for folder, kind in (("a", "int"), ("b", "float")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(
            "from __future__ import annotations\n" + HEAD + f"Kind = {kind}\n"
            "@dataclass(frozen=True)\nclass Options:\n it: Kind = option(1, help='x')\n"
            "@hookimpl\ndef mlxlora_samplers():\n"
            f" return [Sampler(name={folder!r}, summary='s', build=build, options=Options)]\n"
        )
    found = load([str(tmp_path / "a" / "same.py"), str(tmp_path / "b" / "same.py")], {})
    kinds = [explain(found.find("sampler", name).spec.options)[0].type for name in ("a", "b")]
    assert kinds == [int, float]


def test_one_file_twice_is_a_name_given_twice(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "same.py").write_text(SAMPLER.format(name="one"))
    found = load([str(tmp_path / "same.py")] * 2, {})
    with pytest.raises(PluginError, match="is given by"):
        found.find("sampler", "one")


@pytest.mark.parametrize("code", ["import no_such_module_anywhere", "raise SystemExit(0)", "x = 1"])
def test_a_file_that_fails_stops_everything(shelf: Shelf, tmp_path: Path, code: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(PluginError, match=r"mine.py: plugin mine .file. failed to load: "):
        load([str(tmp_path / "mine.py")], {})
    left = [name for name in sys.modules if name.startswith("mlxlora_file_mine")]
    assert not left or code == "x = 1", "what failed halfway is not left behind"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for name in ("absent.py", "folder.py"):
        (tmp_path / "folder.py").mkdir(exist_ok=True)
        with pytest.raises(PluginError, match="no such file"):
            load([str(tmp_path / name)], {})


def test_nothing_loads_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlxlora_mine.py").write_text("raise SystemExit('loaded')")
    monkeypatch.syspath_prepend("")
    load(environ={})
    assert "mlxlora_mine" not in sys.modules


# --- runtimes -----------------------------------------------------------------


def runtimes(*starts: Any) -> Registry:
    owner = Plugin("fast", "fast", "1", "installed", "fast")
    return Registry(
        [owner],
        [
            Component("runtime", specs.Runtime(name=f"r{i}", summary="s", start=start), owner)
            for i, start in enumerate(starts)
        ],
    )


def test_a_runtime_that_fails_is_a_warning_and_leaves_the_others_alone() -> None:
    def fails() -> None:
        raise OSError("no\nlibrary")

    def leaves() -> None:
        raise SystemExit(3)

    found = runtimes(
        fails,
        leaves,
        lambda: "done",
        lambda: None,
        lambda: RuntimeStarted("fast\x1b now", warning=False),
    )
    notes = start_runtimes(found)
    assert [note.warning for note in notes] == [True, True, True, False]
    assert notes[0].text == "runtime fast:r0 failed: OSError: no library"
    assert notes[1].text == "runtime fast:r1 failed: it called sys.exit(3)"
    assert notes[2].text == "runtime fast:r2 failed: start gives str, wanted RuntimeStarted or None"
    assert notes[3].text == "fast\\x1b now"


def test_a_runtime_is_started_once_whatever_else_is_chosen() -> None:
    started: list[str] = []

    def start() -> RuntimeStarted:
        started.append("once")
        return RuntimeStarted("fast")

    for others in ([], [lambda: None]):
        notes = start_runtimes(runtimes(start, *others))
        assert [note.text for note in notes] == ["fast"]
    assert started == ["once"]


def test_what_a_runtime_sets_threads_with_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(device, "_setters", [])
    start_runtimes(runtimes(lambda: RuntimeStarted("fast", set_threads=told.append)))
    with device.product_threads(3):
        assert told == [3]
    assert told == [3, device.thread_count()]


def test_the_exponential_of_a_runtime_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_lent", {})
    start_runtimes(runtimes(lambda: RuntimeStarted("fast", exp=abs), lambda: RuntimeStarted("none")))
    assert device._lent == {"exp": abs}


def test_what_a_runtime_sets_the_precision_with_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(device, "_precisions", [])
    start_runtimes(runtimes(lambda: RuntimeStarted("fast", set_precision=told.append)))
    with device.product_precision("bfloat16"):
        assert told == ["bfloat16"]
    assert told == ["bfloat16", "float32"]


def test_what_else_a_runtime_computes_is_lent_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_lent", {})
    start_runtimes(
        runtimes(lambda: RuntimeStarted("fast", scaled_exp=abs), lambda: RuntimeStarted("more", exp_rows=max))
    )
    assert device.lent("scaled_exp") is abs and device.lent("exp_rows") is max
    assert device.lent("packed_product") is None


def test_every_kind_has_a_hook_and_a_spec() -> None:
    import mlxlora_core.hookspecs as hookspecs

    declared = {name for name in vars(hookspecs) if name.startswith("mlxlora_")}
    assert {hook for hook, _ in registry.KINDS.values()} == declared
