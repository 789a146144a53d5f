"""Plugins that pip has really installed: one that works, and many that do not."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mlxlora-example"
SMALL = ("--set", "train.iters=2", "--set", "generate.num_tokens=3", "--set", "run.folder=out")


# --- one that works -----------------------------------------------------------


def test_a_separate_distribution_from_install_to_uninstall(
    tmp_path: Path, tiny_checkpoint: Path, make_environment: Callable[[str], Any]
) -> None:
    environment = make_environment("example")
    source = shutil.copytree(
        EXAMPLE, tmp_path / "example", ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    recipe, model = source / "recipe.toml", f"model.torch_path={tiny_checkpoint}"
    environment.pip("install", source, cwd=tmp_path)

    (row,) = [p for p in listed(environment, "plugins", tmp_path) if p["name"] == "example"]
    assert (row["distribution"], row["version"], row["origin"], row["status"]) == (
        "mlxlora-example",
        "0.1.0",
        "installed",
        "active",
    )
    components = {(c["kind"], c["id"]) for c in listed(environment, "components", tmp_path)}
    mine = {("builder", "example:markdown"), ("adapter", "example:scaling"), ("sampler", "example:typical")}
    assert mine <= components

    need = ("--set", "plugins.require=mlxlora-example>=0.1")
    done = environment.mlxlora("run", recipe, "--set", model, *SMALL, *need, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_run(json.loads(done.stdout), tmp_path / "out")

    tests = environment.run(environment.python, "-m", "pytest", "-q", source / "tests", cwd=tmp_path)
    assert tests.returncode == 0, tests.stdout

    environment.pip("uninstall", "-y", "mlxlora-example", cwd=tmp_path)
    for verb in ((), ("--dry-run",)):
        gone = environment.forked("run", recipe, "--set", model, *verb, cwd=tmp_path)
        assert gone.returncode == 8
        (line,) = gone.stderr.splitlines()
        assert "recipe.toml: " in line
        for missing in ("no builder 'markdown'", "no adapter 'scaling'", "no sampler 'typical'"):
            assert missing in line
        assert gone.stdout == ""
    needed = environment.forked("run", recipe, "--set", model, *need, "--dry-run", cwd=tmp_path)
    assert needed.returncode == 8 and len(needed.stderr.splitlines()) == 1
    assert "'mlxlora-example>=0.1' is not installed" in needed.stderr
    assert "Fix: pip install 'mlxlora-example>=0.1'" in needed.stderr


def check_run(record: dict[str, Any], folder: Path) -> None:
    """The run used the three components, and its files are there."""
    rows = record["stages"]["data"]["result"]
    assert min(rows["rows"].values()) >= 1
    reasons = {skipped["source"]: skipped["reason"] for skipped in rows["skipped"]}
    assert reasons["data.md:1"] == "text without a heading"
    assert "a heading without text" in reasons.values()
    assert any(row["name"] == "example" for row in [{"name": name} for name in record["plugins"]])
    adapted = record["stages"]["train"]["result"]["adapted"]
    assert len(adapted) == 2 * 7, "every linear of both layers"
    written = (folder / "recipe.toml").read_text()
    for use in ("example:markdown", "example:scaling", "example:typical"):
        assert f'use = "{use}"' in written
    before, after = (record["stages"][stage]["result"]["losses"]["test"] for stage in ("before", "after"))
    assert before["tokens"] == after["tokens"]
    assert before["loss"] != after["loss"]


def listed(environment: Any, verb: str, folder: Path) -> list[dict[str, Any]]:
    done = environment.forked(verb, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


# --- many that do not ---------------------------------------------------------

HEAD = "from mlxlora_core.api import *\ndef build(options): return lambda logits, tokens, key: logits\n"
HOOK = HEAD + "@hookimpl\ndef mlxlora_samplers():\n "
SPEC = "Sampler(name='fine', summary='s', build=build)"

#: distribution -> (the code of its module, the reason that must be told)
BROKEN = {
    "raises-at-import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such"),
    "no-syntax": ("def (:", "SyntaxError: invalid syntax (no_syntax.py, line 1)"),
    "exits": ("import sys\nsys.exit(3)", "it called sys.exit(3)"),
    "base-exception": ("class Gone(BaseException): pass\nraise Gone('away')", "Gone: away"),
    "hook-raises": (HOOK + "raise OSError('no\\ndisk')", "OSError: no disk"),
    "hook-asks": (
        HEAD + "@hookimpl\ndef mlxlora_samplers(config): return []",
        "Argument(s) {'config'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "hook-unknown": (
        HEAD + "@hookimpl\ndef mlxlora_sampler(): return []",
        "unknown hook 'mlxlora_sampler' (did you mean 'mlxlora_samplers'?",
    ),
    "newer-api": ("mlxlora_api = 99\n" + HOOK + f"return [{SPEC}]", "it needs plugin API 99, this is 2"),
    "other-spec": (
        HOOK + "return [Adapter(name='a', summary='s', wrap=lambda a, b, c: a, fuse=lambda a, b: b)]",
        "mlxlora_samplers gives Adapter, wanted Sampler",
    ),
    "bad-name": (HOOK + "return [Sampler(name='Top K', summary='s', build=build)]", "name 'Top K' does not"),
    "midway": (HOOK + f"yield {SPEC}\n raise KeyError('gone')", "KeyError: 'gone'"),
    "absent": (None, "ModuleNotFoundError: No module named 'absent'"),
    "stale": (None, "ModuleNotFoundError: No module named 'stale'"),
}
ADAPTER = (
    "Adapter(name='lora', summary='s', wrap=lambda linear, place, options: linear, fuse=lambda module, w: w)"
)
#: distributions that load, but are not quiet or stand in the way of a name
AWKWARD = {
    "squatter": (HEAD + f"@hookimpl\ndef mlxlora_adapters(): return [{ADAPTER}]", "squatter"),
    "chatty": ("print('{ hello')\n" + HOOK + "return []", "chatty"),
    "twin-one": (HOOK + "return [Sampler(name='twin', summary='s', build=build)]", "twin"),
    "twin-two": (HOOK + "return [Sampler(name='twin', summary='s', build=build)]", "twin"),
}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory, make_environment: Callable[[str], Any]) -> Any:
    """An environment in which all of them are installed."""
    environment = make_environment("crowd")
    folder = tmp_path_factory.mktemp("wheels")
    wheels = [wheel(folder, name, code, name) for name, (code, _) in BROKEN.items() if name != "stale"]
    wheels += [wheel(folder, name, code, entry) for name, (code, entry) in AWKWARD.items()]
    # An editable install leaves a .pth file; its folder is gone.
    wheels.append(wheel(folder, "stale", None, "stale", {"__editable__.stale.pth": "/no/such/folder\n"}))
    environment.pip("install", "--no-deps", *wheels, cwd=folder)
    return environment


def wheel(
    folder: Path, name: str, code: str | None, entry: str, files: Mapping[str, str] | None = None
) -> Path:
    """A wheel with one module, named like the distribution, and one entry point."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    contents = dict(files or {}) | ({f"{module}.py": code} if code is not None else {})
    contents |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[mlxlora]\n{entry} = {module}\n",
    }
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        record = ""
        for file, text in contents.items():
            archive.writestr(file, text)
            digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{file},sha256={digest},{len(text.encode())}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def failures(stderr: str) -> dict[str, str]:
    """plugin -> its line on stderr; each must have one, and no other line is there but what plugins print."""
    found = {}
    for line in stderr.splitlines():
        if line != "{ hello":
            assert line.startswith("mlxlora: plugin "), line
            name = line.split()[2]
            assert name not in found, f"two lines for {name}"
            found[name] = line
    return found


def test_plugins_shows_each_with_its_reason(crowd: Any, tmp_path: Path) -> None:
    rows = {row["distribution"]: row for row in listed(crowd, "plugins", tmp_path)}
    for name, (_, reason) in BROKEN.items():
        assert rows[name]["status"] == "error", name
        assert reason in rows[name]["reason"]
        assert rows[name]["components"] == []
    for name in AWKWARD:
        assert rows[name]["status"] == "active"
    built_in = [row for row in listed(crowd, "plugins", tmp_path) if row["origin"] == "built-in"]
    assert built_in and all(row["status"] == "active" for row in built_in), built_in


@pytest.mark.parametrize(
    "arguments",
    [
        ("plugins",),
        ("components",),
        ("components", "sampler", "--json"),
        ("options", "sampler", "top-k"),
        ("options", "adapter", "lora:lora"),
        ("run", "recipe.toml", "--dry-run"),
    ],
)
def test_verbs_that_name_none_of_them_work(
    crowd: Any, tmp_path: Path, tiny_checkpoint: Path, arguments: tuple[str, ...]
) -> None:
    write_recipe(tmp_path, tiny_checkpoint)
    done = crowd.forked(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert failures(done.stderr).keys() == BROKEN.keys()
    assert "hello" not in done.stdout, "what a plugin prints is no result"


def test_help_needs_no_plugin(crowd: Any, tmp_path: Path) -> None:
    for arguments in (("--help",), ("run", "--help"), ("--version",)):
        done = crowd.mlxlora(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_run_that_names_none_of_them_works(crowd: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_recipe(tmp_path, tiny_checkpoint)
    done = crowd.forked("run", "recipe.toml", *SMALL, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert set(record["stages"]) == {"model", "data", "before", "train", "after"}
    assert not BROKEN.keys() & record["plugins"].keys()
    # What the run wrote down names the built-in adapter, and is understood again.
    again = crowd.forked("run", tmp_path / "out" / "recipe.toml", "--dry-run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_a_run_that_names_one_stops_with_the_reason(
    crowd: Any, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    write_recipe(tmp_path, tiny_checkpoint)
    done = crowd.forked("run", "recipe.toml", "--set", "sampler.use=midway:fine", cwd=tmp_path)
    assert done.returncode == 8
    last = done.stderr.splitlines()[-1]
    assert "no sampler 'midway:fine'" in last
    assert "plugin midway (midway 1.0) failed to load: KeyError: 'gone'" in last
    assert not (tmp_path / "runs").exists(), "nothing was begun"


@pytest.mark.parametrize("name", ["midway", "no-syntax", "EXITS"])
def test_one_that_is_required_stops_every_verb(crowd: Any, tmp_path: Path, name: str) -> None:
    done = crowd.forked("components", "-P", name, cwd=tmp_path)
    assert done.returncode == 8
    lines = [line for line in done.stderr.splitlines() if line != "{ hello"]
    assert len(lines) == 1
    assert BROKEN[name.lower()][1] in lines[0]
    shown = crowd.forked("components", "-P", name, "--debug", cwd=tmp_path)
    assert "Traceback" in shown.stderr and f"{name.lower().replace('-', '_')}.py" in shown.stderr


def test_names_that_two_plugins_give(crowd: Any, tmp_path: Path) -> None:
    done = crowd.forked("options", "adapter", "lora", cwd=tmp_path)
    assert done.returncode == 8
    last = done.stderr.splitlines()[-1]
    assert "given by lora (mlxlora " in last and "squatter (squatter 1.0)" in last
    assert "Fix: write lora:lora or squatter:lora" in last
    assert crowd.forked("options", "adapter", "squatter:lora", cwd=tmp_path).returncode == 0

    # One entry-point name from two distributions: the distribution tells them apart.
    done = crowd.forked("options", "sampler", "twin", cwd=tmp_path)
    assert done.returncode == 8
    assert "Fix: write twin-one:twin or twin-two:twin" in done.stderr
    shown = crowd.forked("options", "sampler", "twin-two:twin", cwd=tmp_path)
    assert (shown.returncode, "twin-two:twin" in shown.stdout) == (0, True)


def test_selection(crowd: Any, tmp_path: Path) -> None:
    def active(*select: str, **variables: str) -> tuple[set[str], ...]:
        """(distributions that are active, those that failed)."""
        done = crowd.forked("plugins", "--json", *select, cwd=tmp_path, **variables)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        return tuple(
            {row["distribution"] for row in rows if row["status"] == status and row["origin"] != "built-in"}
            for status in ("active", "error")
        )

    everything = (set(AWKWARD), set(BROKEN))
    assert active() == everything
    assert active(MLXLORA_PLUGINS="") == (set(), set())
    assert active(MLXLORA_PLUGINS="twin-one, midway,elsewhere") == ({"twin-one"}, {"midway"})
    misspelt = crowd.forked("components", cwd=tmp_path, MLXLORA_PLUGINS="twin-one,squater")
    assert misspelt.returncode == 8
    assert "MLXLORA_PLUGINS names no plugin: 'squater' (did you mean 'squatter'?" in misspelt.stderr
    seen = crowd.forked("plugins", cwd=tmp_path, MLXLORA_PLUGINS="squater")
    assert seen.returncode == 0 and seen.stderr.startswith("mlxlora: warning: MLXLORA_PLUGINS names no")
    assert crowd.forked("--help", cwd=tmp_path, MLXLORA_PLUGINS="squater").returncode == 0
    assert active(MLXLORA_PLUGINS="twin") == ({"twin-one", "twin-two"}, set())
    assert active("-P", "squatter", MLXLORA_PLUGINS="") == ({"squatter"}, set())
    assert active("-P", "no:midway", "-P", "no:twin-two") == (
        set(AWKWARD) - {"twin-two"},
        set(BROKEN) - {"midway"},
    )
    (tmp_path / "mine.py").write_text(HOOK + f"return [{SPEC}]")
    assert active(MLXLORA_PLUGINS="") == (set(), set()), "nothing loads from the working directory"
    assert active("-P", "./mine.py", MLXLORA_PLUGINS="") == ({"file"}, set())


def test_damaged_metadata_takes_nobody_along(crowd: Any, tmp_path: Path) -> None:
    (packages,) = crowd.folder.glob("lib/python*/site-packages")
    info = packages / "damaged-1.0.dist-info"
    info.mkdir()
    try:
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: damaged\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[mlxlora]\nthis is no entry point\n")
        rows = {row["distribution"]: row for row in listed(crowd, "plugins", tmp_path)}
    finally:
        shutil.rmtree(info)
    assert rows["damaged"]["status"] == "error"
    assert "entry_points.txt cannot be read" in rows["damaged"]["reason"]
    assert {name for name, row in rows.items() if row["status"] == "active"} >= {"mlxlora", *AWKWARD}


def write_recipe(folder: Path, checkpoint: Path) -> None:
    """recipe.toml that names built-in components only, by full ids where a name is taken."""
    lines = [json.dumps({"text": f"Q: What is {i}?\nA: The number {i}."}) for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.toml").write_text(
        f'[model]\ntorch_path = "{checkpoint}"\n'
        '[data]\nuse = "jsonl"\noptions = { path = "rows.jsonl" }\n'
        '[adapter]\nuse = "lora:lora"\n'
        '[sampler]\nuse = "greedy"\n'
        '[generate]\nprompts = ["Q: What is 3?\\nA:"]\n'
    )
