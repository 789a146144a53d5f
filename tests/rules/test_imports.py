"""Who may import what, and what nobody may import before it is needed."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

from mlxlora_core.cli.verbs import VERBS

ROOT = Path(__file__).parents[2]
CORE, PLUGINS = ROOT / "mlxlora_core", ROOT / "plugins"
ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
HEAVY = {
    *("mlx", "numpy", "torch", "sentencepiece", "safetensors", "tokenizers", "scipy_openblas32"),
    *("prompt_toolkit", "starlette", "uvicorn"),
}
#: what plugins may import of core: the contract, the maths, safe reading, and chat templates
DOORS = {"mlxlora_core.api", "mlxlora_core.ops", "mlxlora_core.files", "mlxlora_core.chat"}

#: the rooms of core that every verb may import; the empty one is the door
LIGHT_ROOMS = {"", "plugins", "files", "machine", "distributed", "runs", "cli", "python"}
#: what reads or computes with tensors in them
HEAVY_IN_LIGHT_ROOMS = {
    "mlxlora_core.ops",
    "mlxlora_core.files.npz_file",
    "mlxlora_core.files.tensor_checks",
    "mlxlora_core.files.tensor_file",
}
#: what other rooms have that light ones need: settings, events, the record of a dataset, checkpoints as files
LIGHT_IN_HEAVY_ROOMS = {
    "mlxlora_core.model.events",
    "mlxlora_core.model.hub",
    "mlxlora_core.model.located",
    "mlxlora_core.model.shipped",
    "mlxlora_core.model.special_texts",
    "mlxlora_core.model.stop_texts",
    "mlxlora_core.server.settings",
    "mlxlora_core.training.scoring",
    "mlxlora_core.training.settings",
    "mlxlora_core.training.sources",
    "mlxlora_core.training.dataset",
    "mlxlora_core.training.findings",
    "mlxlora_core.training.events",
    "mlxlora_core.training.checkpoints",
    "mlxlora_core.training.metrics",
    "mlxlora_core.training.progress",
    "mlxlora_core.training.identity",
    "mlxlora_core.training.outputs",
}
LIGHT_LIBRARIES = {"click", "pluggy", "rich", "tomli_w"}

#: plugin -> the library that it is about
OWN = {
    "mlxlora_torch": {"torch"},
    "mlxlora_sentencepiece": {"sentencepiece"},
    "mlxlora_tokenizers": {"tokenizers"},
    "mlxlora_openblas": {"scipy_openblas32", "elftools"},
    "mlxlora_tensorboard": {"tensorboardX"},
    "mlxlora_trackio": {"trackio"},
    "mlxlora_wandb": {"wandb"},
}


def light_modules() -> set[str]:
    """Every module of core that must load nothing heavy, read off the folders."""
    found = set()
    for path in CORE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = parts[1] if len(parts) > 2 else ""
        if room in LIGHT_ROOMS:
            found.add(".".join(parts).removesuffix(".__init__"))
    return (found | LIGHT_IN_HEAVY_ROOMS) - HEAVY_IN_LIGHT_ROOMS


LIGHT = light_modules()
PACKAGES = sorted(path.name for path in PLUGINS.iterdir() if (path / "__init__.py").is_file())
CLI = sorted(
    f"mlxlora_core.cli.{path.stem}".removesuffix(".__init__") for path in (CORE / "cli").glob("*.py")
)


# --- what is imported when ----------------------------------------------------


# Plugins of somebody else are no matter of these tests.
ALONE = {"MLXLORA_PLUGINS": "", "PATH": "", "PYTHONWARNINGS": "error"}


def loaded(code: str) -> set[str]:
    """The top-level names of all modules that are there after ``code`` has run in a fresh process."""
    program = (
        "import contextlib, io, json, sys\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    {code}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ALONE)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["train", "--help"],
        ["serve", "--help"],
        ["plugins"],
        ["plugins", "--json"],
        ["components"],
        ["components", "sampler", "--json"],
        ["options", "sampler", "top-p"],
        ["options", "adapter", "lora", "--json"],
        ["options", "adapter", "no-such-adapter"],
        ["run", "demo", "--dry-run"],
    ],
    ids=" ".join,
)
def test_looking_around_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"from mlxlora_core.cli import execute; assert execute({arguments!r}) in (0, 8)"
    assert loaded(code) & HEAVY == set()


def test_help_of_all_verbs_loads_no_plugin() -> None:
    names = loaded("from mlxlora_core.cli import execute; execute(['--help'])")
    assert names & set(PACKAGES) == set()


#: imports some modules one after the other
IN_TURN = """
import json, sys
found = {}
for module in sys.argv[1:]:
    before = set(sys.modules)
    __import__(module)
    found[module] = sorted({name.partition(".")[0] for name in {*sys.modules} - before})
print(json.dumps(found))
"""
#: imports each of some modules in a process of its own, forked from one that has imported nothing of ours
EACH = """
import json, os, sys
found = {}
for module in sys.argv[1:]:
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            __import__(module)
            names = sorted({name.partition(".")[0] for name in sys.modules})
            os.write(writer, json.dumps(names).encode())
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        found[module] = json.loads(pipe.read() or "null")
    os.wait()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded_by() -> dict[str, list[str] | None]:
    """Module -> the top-level names of all that its import brings, or None where it cannot be imported.

    By day what it brings beyond those before it, for no modules import each other.
    """
    command = [sys.executable, "-c", EACH if ALL else IN_TURN, *sorted(LIGHT)]
    done = subprocess.run(command, capture_output=True, text=True, env=ALONE)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str] | None] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_light_modules_load_nothing_heavy(loaded_by: dict[str, list[str] | None], module: str) -> None:
    names = loaded_by[module]
    assert names is not None
    assert set(names) & HEAVY == set()


def test_all_verbs_together_load_nothing_heavy() -> None:
    assert loaded("import " + ", ".join(CLI)) & HEAVY == set()


def test_the_maths_is_heavy() -> None:
    names = loaded("import mlxlora_core.ops")
    assert "mlx" in names, "or this test shows nothing"


# --- who imports what ---------------------------------------------------------


def imports(path: Path, *, everywhere: bool = True) -> Iterator[tuple[int, str]]:
    """(line, module) of each import in a file; at the top level only unless ``everywhere``.

    Imports for the type checker count where everything counts.
    """
    tree = ast.parse(path.read_text("utf-8"), path)
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:  # from mlxlora_core import data: mlxlora_core.data is meant
                inner = ROOT / node.module.replace(".", "/") / alias.name
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module


def test_core_never_imports_a_plugin() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in CORE.rglob("*.py")
        for line, module in imports(path)
        if module.startswith("mlxlora_") and module.partition(".")[0] != "mlxlora_core"
    ]
    assert found == []


def test_light_modules_of_core_import_light_ones_at_their_top() -> None:
    allowed = LIGHT | set(CLI)
    found = []
    for module in sorted(allowed):
        path = ROOT / (module.replace(".", "/") + ".py")
        path = path if path.is_file() else path.with_suffix("") / "__init__.py"
        for line, name in imports(path, everywhere=False):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names | LIGHT_LIBRARIES and name not in allowed:
                found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert found == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_imports_no_other_verb(verb: str) -> None:
    """What verbs share stands in modules of its own."""
    others = {f"mlxlora_core.cli.{other}" for other in VERBS if other != verb}
    assert {module for _, module in imports(CORE / "cli" / f"{verb}.py")} & others == set()


def test_nothing_imports_a_verb_but_the_list_of_verbs() -> None:
    verbs = {f"mlxlora_core.cli.{verb}" for verb in VERBS}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in CORE.rglob("*.py")
        for line, module in imports(path)
        if module in verbs
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_plugin_imports_its_own_and_the_api(package: str) -> None:
    allowed = sys.stdlib_module_names | {"mlx", "numpy", package} | OWN.get(package, set())
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in sorted((PLUGINS / package).rglob("*.py"))
        for line, module in imports(path)
        if module not in DOORS and module.partition(".")[0] not in allowed
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_plugin_imports_another(package: str) -> None:
    others = set(PACKAGES) - {package}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in sorted((PLUGINS / package).rglob("*.py"))
        for line, module in imports(path)
        if module.partition(".")[0] in others
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_door_of_a_plugin_is_light(package: str) -> None:
    """Its __init__ imports nothing heavy at its top, and so nothing of its own that does."""
    assert loaded(f"import {package}") & HEAVY == set()


@pytest.mark.parametrize("door", sorted(DOORS))
def test_a_door_exports_what_it_says(door: str) -> None:
    module = importlib.import_module(door)
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


# --- one door -----------------------------------------------------------------


def test_every_built_in_is_registered_as_anybody_would() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert sorted(project["entry-points"]["mlxlora"].values()) == PACKAGES
    installed = distribution("mlxlora").entry_points.select(group="mlxlora")
    assert {e.name: e.value for e in installed} == project["entry-points"]["mlxlora"]


def test_built_in_plugins_are_all_active_and_give_something() -> None:
    from mlxlora_core.plugins import load

    for plugin in load(environ={"MLXLORA_PLUGINS": ""}).plugins:
        if plugin.origin == "built-in":
            assert plugin.status == "active", f"{plugin}: {plugin.reason}"
            assert plugin.components, plugin
