"""The same end whatever the surroundings: exit codes with and without --debug, and those of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlxlora_core import cli
from mlxlora_core.cli.verbs import commands
from mlxlora_core.errors import ResourceError
from mlxlora_core.files import tensor_file

Capfd = pytest.CaptureFixture[str]

DEFECT = """
from mlxlora_core.api import Sampler, hookimpl

def build(options):
    {body}

@hookimpl
def mlxlora_samplers():
    return [Sampler(name="odd", summary="odd", build=build)]
"""


def ended(capfd: Capfd, *arguments: object) -> tuple[int, list[str]]:
    capfd.readouterr()
    code = cli.execute([str(argument) for argument in arguments])
    return int(code), capfd.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --model", "Option '--model' requires an argument. See: mlxlora train --help"),
        ("generate -n", "Option '-n' requires an argument. See: mlxlora generate --help"),
        ("train --resume=3", "Option '--resume' does not take a value. See: mlxlora train --help"),
        ("convert", "Missing option '--torch-path' / '--model'. See: mlxlora convert --help"),
        ("report a b", "Got unexpected extra argument (b). See: mlxlora report --help"),
        ("plugins nonsense", "No such command 'nonsense'. See: mlxlora plugins --help"),
        (
            "plugins --json new sampler a",
            "--json stands before 'new', which does not read it. See: mlxlora plugins --help",
        ),
        ("nonsense", "No such command 'nonsense'. See: mlxlora --help"),
    ],
)
def test_a_wrong_command_line_names_the_help_of_its_verb(capfd: Capfd, line: str, said: str) -> None:
    assert ended(capfd, *line.split()) == (2, [f"mlxlora: {said}"])


@pytest.mark.parametrize("verb", commands())
def test_every_verb_is_named_by_what_is_wrong_with_its_options(capfd: Capfd, verb: str) -> None:
    for wrong in ("--nonsense", "--plugin", "--debug=1", "-P"):
        code, lines = ended(capfd, *verb.split(), wrong)
        assert code == 2 and len(lines) == 1 and lines[0].endswith(f" See: mlxlora {verb} --help")
        assert "?." not in lines[0]


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (2, "generate --nonsense"),
        (2, "generate --model MODEL -p A -n 0"),
        (2, "nonsense"),
        (3, "evaluate --model MODEL --data none"),
        (4, "generate --model none -p A"),
        (8, "generate --model MODEL -p A --sampler none"),
        (8, "generate --model MODEL -p A --sampler odd -P ./odd.py"),
        (0, "components"),
    ],
)
@pytest.mark.parametrize("way", ["--debug", "MLXLORA_DEBUG"])
def test_debug_changes_no_exit_code(
    tmp_path: Path,
    tiny_model: Path,
    capfd: Capfd,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    line: str,
    way: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(DEFECT.format(body="raise SystemExit(0)"))
    arguments = line.replace("MODEL", str(tiny_model)).split()
    plain, said = ended(capfd, *arguments)
    if way == "--debug":
        arguments.append("--debug")
    else:
        monkeypatch.setenv("MLXLORA_DEBUG", "1")
    debug, more = ended(capfd, *arguments)
    assert plain == debug == code
    if "nonsense" not in line and code:
        assert any("Traceback" in text for text in more)
        assert more[-1] == said[-1], "the line is the last one all the same"


def test_a_defect_is_70_with_debug_too(capfd: Capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxlora_core.cli import show

    monkeypatch.setattr(show, "table", lambda *_, **__: 1 / 0)
    for more in ((), ("--debug",)):
        code, lines = ended(capfd, "components", *more)
        assert code == 70 and lines[-1].startswith("mlxlora: a defect of mlxlora: ZeroDivisionError")


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"rank": 4096, "scale": 2.0, "dropout": 0.0}},
        {"options": {"rank": -1, "scale": 2.0, "dropout": 0.0}},
        {"options": {"rank": 8, "scale": 1e308, "dropout": 0.0}},
        {"options": {"nonsense": 8}},
        {"config": {"targets": ["wq"], "layers": 0}},
        {"paths": ["nothing"]},
    ],
    ids=str,
)
def test_what_is_wrong_in_an_adapter_file_is_4(
    tmp_path: Path, tiny_model: Path, tiny_adapter: Path, capfd: Capfd, change: dict[str, object]
) -> None:
    tensors, metadata = tensor_file.load(tiny_adapter)
    (key,) = (key for key in metadata if metadata[key].startswith("{") and '"paths"' in metadata[key])
    metadata[key] = json.dumps(json.loads(metadata[key]) | change)
    changed = tmp_path / "changed.safetensors"
    tensor_file.save(changed, sorted(tensors.items()), metadata, len(tensors))
    code, lines = ended(capfd, "generate", "--model", tiny_model, "-p", "A", "--adapter-file", changed)
    assert code == 4, lines
    assert len(lines) == 1 and str(changed) in lines[0]


@pytest.mark.parametrize(
    "stated", [{"rope_theta": -1}, {"n_heads": 0}, {"norm_eps": "x"}, {"dim": 1e40}], ids=str
)
def test_what_is_wrong_in_a_model_folder_is_4(
    tmp_path: Path, tiny_model: Path, capfd: Capfd, stated: dict[str, object]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | stated))
    code, lines = ended(capfd, "generate", "--model", model, "-p", "A")
    assert code == 4 and len(lines) == 1, lines


def test_too_little_memory_to_load_mlx_is_6(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxlora_core.machine import device

    def unable(*_: object) -> None:
        raise ImportError("libmlx.so: failed to map segment from shared object")

    monkeypatch.setattr("builtins.__import__", unable)
    with pytest.raises(ResourceError):
        device.prepare_cpu()


#: a sampler whose build refuses an option that no range forbids
PICKY = """
from dataclasses import dataclass
from mlxlora_core.api import Sampler, UsageError, hookimpl, option

@dataclass(frozen=True)
class Options:
    k: int = option(3, help="any")

def build(options):
    raise UsageError(f"k {options.k} is not prime", fix="set a prime")

@hookimpl
def mlxlora_samplers():
    return [Sampler(name="picky", summary="picky", options=Options, build=build)]
"""


@pytest.mark.parametrize("more", ["--dry-run", ""])
def test_a_sampler_that_refuses_its_options_is_told_before_the_first_stage(
    tmp_path: Path,
    tiny_model: Path,
    tiny_rows: Path,
    capfd: Capfd,
    monkeypatch: pytest.MonkeyPatch,
    more: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picky.py").write_text(PICKY)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\nmlx_path = "{tiny_model}"\n[data]\nuse = "jsonl"\noptions = {{path = "{tiny_rows}"}}\n'
        '[sampler]\nuse = "picky"\noptions = {k = 4}\n[generate]\nprompts = ["A"]\n'
    )
    code, lines = ended(capfd, "run", recipe, "-P", "./picky.py", *more.split())
    assert (code, lines) == (2, ["mlxlora: k 4 is not prime. Fix: set a prime"])
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.json"))
    model = ("--model", tmp_path / "none", "-p", "A", "--sampler", "picky", "-P", "./picky.py")
    assert ended(capfd, "generate", *model)[0] == 2, "before the model is looked for"
    training = ("--data", tiny_rows, "--adapter-file", "a.npz", "--iters", 1)
    assert ended(capfd, "train", *model, *training)[0] == 2
    assert not (tmp_path / "a.npz").exists()
