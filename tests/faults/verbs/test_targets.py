"""No output of any verb replaces an input, or a file that mlxlora has not written: every pair, tried.

The options are read off the commands, so that a new output joins by itself. The suite takes a third of
the inputs for each way to name one, in turn; ``MLXLORA_TEST_ALL=1`` takes all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_paths import ALL, WORKING, Base, base, command, faults, line

from mlxlora_core import cli
from mlxlora_core.cli.declare import PathType
from mlxlora_core.cli.verbs import commands

__all__ = ["base"]

OUTPUTS = [
    (verb, param.name, param.type.writes)
    for verb, known in commands().items()
    for param in known.params
    if isinstance(param.type, PathType) and param.type.writes and param.name is not None
]


# --- files of somebody else ---------------------------------------------------


def text(path: Path, base: Base) -> None:
    path.write_text("precious")


def rows(path: Path, base: Base) -> None:
    shutil.copy(base.rows / "train.jsonl", path)


def another_log(path: Path, base: Base) -> None:
    path.write_text('{"kind": "train", "step": 1, "loss": 2.5}\n')


def log_with_notes(path: Path, base: Base) -> None:
    path.write_text('{"kind": "valid", "step": 0, "loss": 6.4, "tokens": 1, "seconds": 0.1}\nmy notes\n')


def weights(path: Path, base: Base) -> None:
    shutil.copy(base.model / "model.safetensors", path)


def peft(path: Path, base: Base) -> None:
    save_file({"base_model.lora_A": np.zeros((2, 2), "f")}, path, {"format": "pt"})


def archive(path: Path, base: Base) -> None:
    with open(path, "wb") as file:
        np.savez(file, w=np.zeros(3))


def damaged(path: Path, base: Base) -> None:
    path.write_bytes(base.adapter.read_bytes()[:7])


def script(path: Path, base: Base) -> None:
    path.write_text("print('precious')\n")


FILES: dict[str, Callable[[Path, Base], None]] = {
    kind.__name__: kind
    for kind in (text, rows, another_log, log_with_notes, weights, peft, archive, damaged, script)
}


def notes(path: Path, base: Base) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("precious")


def dataset_of_another_tool(path: Path, base: Base) -> None:
    shutil.copytree(base.rows, path)
    (path / "dataset.json").write_text('{"rows": 4, "licence": "mine"}')


def dataset_with_an_empty_record(path: Path, base: Base) -> None:
    shutil.copytree(base.rows, path)
    (path / "dataset.json").touch()


def dataset_with_a_link(path: Path, base: Base) -> None:
    assert cli.execute(["data", "--builder", "jsonl", "--set", f"path={base.rows}", "--out", str(path)]) == 0
    (path / "test.jsonl").unlink()
    (path / "test.jsonl").symlink_to(base.rows / "test.jsonl")


def model_of_another_tool(path: Path, base: Base) -> None:
    shutil.copytree(base.model, path)
    save_file({"w": np.zeros((2, 2), "f")}, path / "model.safetensors", {"format": "pt"})


def model_with_notes(path: Path, base: Base) -> None:
    shutil.copytree(base.model, path)
    (path / "README.md").write_text("precious")


def export_of_another_tool(path: Path, base: Base) -> None:
    notes(path, base)
    (path / "export.json").write_text(json.dumps({"files": {"notes.txt": 8}}))


FOLDERS: dict[str, Callable[[Path, Base], None]] = {
    kind.__name__: kind
    for kind in (
        text,
        notes,
        dataset_of_another_tool,
        dataset_with_an_empty_record,
        dataset_with_a_link,
        model_of_another_tool,
        model_with_notes,
        export_of_another_tool,
    )
}


def contents(place: Path) -> dict[str, bytes | str]:
    """Path -> what every file below a folder holds, or where a link leads to."""
    return {
        str(path.relative_to(place)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in place.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def overwriting(verb: str, arguments: list[str]) -> list[str]:
    """The command line with leave to replace what is there, where the verb has that."""
    known = {option for param in command(verb).params for option in param.opts}
    return [*arguments, "--overwrite"] if "--overwrite" in known else arguments


@pytest.mark.parametrize(
    ("verb", "option", "kind"),
    [(v, o, kind) for v, o, writes in OUTPUTS for kind in (FILES if writes == "file" else FOLDERS)],
)
@pytest.mark.parametrize("linked", [False, True], ids=["there", "behind a link"])
def test_what_somebody_else_has_written_stays(
    verb: str,
    option: str,
    kind: str,
    linked: bool,
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "there.npz" if kind == "archive" else "there.safetensors"
    place = tmp_path / "theirs" / name
    place.parent.mkdir()
    (FILES | FOLDERS)[kind](place, base)
    target = place
    if linked:
        target = tmp_path / name
        target.symlink_to(place)
    before = contents(place.parent)
    capfd.readouterr()
    given = WORKING[verb](base) | {option: target}
    code = cli.execute(overwriting(verb, line(verb, given)))
    err = capfd.readouterr().err
    assert code in (4, 5) and err.count("\n") == 1, err
    assert contents(place.parent) == before


# --- inputs -------------------------------------------------------------------


def inputs_of(verb: str, base: Base) -> list[Path]:
    """Files and folders that a verb reads, each a copy of its own below ``in``."""
    shutil.copytree(base.checkpoint, "in/checkpoint")
    shutil.copytree(base.model, "in/model")
    shutil.copytree(base.rows, "in/rows")
    shutil.copy(base.adapter, "in/adapter.safetensors")
    Path("in/plugin.py").write_text("")
    return sorted(Path("in").resolve().rglob("*"))


@pytest.mark.parametrize(("verb", "option"), [(verb, option) for verb, option, _ in OUTPUTS])
@pytest.mark.parametrize("by", ["name", "link", "hard link", "way round"])
def test_no_output_is_an_input(
    verb: str,
    option: str,
    by: str,
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    paths = inputs_of(verb, base)
    own = Base(*(Path("in", name) for name in ("checkpoint", "model", "adapter.safetensors", "rows")))
    before = contents(tmp_path / "in")
    first = 0 if ALL else (len(option) + len(by)) % 3
    for number, path in list(enumerate(paths))[first :: 1 if ALL else 3]:
        target = path
        if by == "link":
            target = tmp_path / f"link{number}{path.suffix}"
            target.symlink_to(path)
        elif by == "way round":
            target = tmp_path / "in" / ".." / path.relative_to(tmp_path)
        elif by == "hard link":
            if path.is_dir():
                continue
            target = tmp_path / f"hard{number}{path.suffix}"
            os.link(path, target)
        given = WORKING[verb](own) | {option: target}
        arguments = [*line(verb, given), "-P", str(tmp_path / "in" / "plugin.py")]
        if verb == "train":
            arguments += ["--resume-adapter-file", "in/adapter.safetensors"]
        found = faults(f"{option} {path}", overwriting(verb, arguments), capfd)
        assert not found, found
        assert contents(tmp_path / "in") == before, path


def test_rows_that_are_not_there_yet_are_no_place_for_a_log(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base.rows, "rows")
    Path("rows/valid.jsonl").unlink()
    given = WORKING["train"](base) | {"data": "rows", "metrics_file": "rows/valid.jsonl"}
    assert cli.execute(line("train", given)) == 2
    assert "is an input of this command" in capfd.readouterr().err
    assert not Path("rows/valid.jsonl").exists()


@pytest.mark.parametrize("metrics", ["./a.safetensors", "a.checkpoints", "link.safetensors"])
def test_two_outputs_are_not_one(
    metrics: str,
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link.safetensors").symlink_to("a.safetensors")
    given = WORKING["train"](base) | {"metrics_file": metrics}
    assert cli.execute(line("train", given)) == 2
    assert "two outputs go here" in capfd.readouterr().err


# --- what is ours -------------------------------------------------------------


def test_what_is_ours_is_replaced_where_that_is_said(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in sorted({verb for verb, _, _ in OUTPUTS if "--overwrite" in overwriting(verb, [])}):
        (tmp_path / verb).mkdir()
        monkeypatch.chdir(tmp_path / verb)
        given = WORKING[verb](base) | ({"metrics_file": "m.jsonl"} if verb == "train" else {})
        assert cli.execute(line(verb, given)) == 0, verb
        assert cli.execute(line(verb, given)) == 5, verb
        assert "--overwrite" in capfd.readouterr().err.splitlines()[-1], verb
        assert cli.execute([*line(verb, given), "--overwrite"]) == 0, verb


def test_an_adapter_that_is_there_stays_and_its_training_can_be_taken_up(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = line("train", WORKING["train"](base))
    assert cli.execute(arguments) == 0
    content = Path("a.safetensors").read_bytes()
    shutil.rmtree("a.checkpoints")
    assert cli.execute(arguments) == 5, "without its checkpoints too"
    assert "holds an adapter already" in capfd.readouterr().err
    assert Path("a.safetensors").read_bytes() == content
    assert cli.execute([*arguments, "--overwrite"]) == 0
    assert cli.execute([*arguments, "--resume"]) == 0


def test_an_empty_file_is_nobodys(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.safetensors").touch()
    Path("m.jsonl").touch()
    given = WORKING["train"](base) | {"metrics_file": "m.jsonl"}
    assert cli.execute(line("train", given)) == 0
    assert Path("a.safetensors").stat().st_size and Path("m.jsonl").stat().st_size
