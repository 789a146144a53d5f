"""Catalogue 35, 37, 75, 76, 78: real disks that are full or read-only, and real limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxlora_core import cli

#: does each of a list of [shell command, verb and arguments]; tells exit code, stderr and what is there
INSIDE = """
import contextlib, io, json, subprocess, sys
from pathlib import Path
from mlxlora_core import cli

place, todo = Path(sys.argv[1]), json.loads(sys.argv[2])
for shell, arguments in todo:
    subprocess.run(shell, shell=True, check=True)
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = cli.execute(arguments)
    there = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    print(json.dumps([code, err.getvalue(), there]))
"""

Outcome = tuple[int, list[str], list[str]]


def inside(place: Path, *todo: tuple[str, list[object]]) -> list[Outcome]:
    """Do verbs in a process that may mount: the exit code, lines of stderr and what is in ``place``."""
    wanted = json.dumps([[shell, list(map(str, arguments))] for shell, arguments in todo])
    command = ["unshare", "-rm", sys.executable, "-c", INSIDE, str(place), wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == len(todo)
    return [(code, err.splitlines(), there) for code, err, there in outcomes]


def bytes_on_disk(folder: Path) -> int:
    """What the files of a folder take in pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


def test_a_disk_that_fills_in_any_part_of_a_conversion(
    tmp_path: Path, tiny_checkpoint: Path, tiny_model: Path
) -> None:
    """A little too small for all that is known before; for the weights; for the last file, config.json."""
    place = tmp_path / "disk"
    place.mkdir()
    arguments = ["convert", "--torch-path", tiny_checkpoint, "--mlx-path", place / "model"]
    arguments += ["--dtype", "float32"]
    whole = bytes_on_disk(tiny_model)
    lock = 4096  # held meanwhile
    mount = "mount -t tmpfs -o size={} none " + str(place)
    again = "mount -o remount,size={} " + str(place)
    outcomes = inside(
        place,
        (mount.format(64 << 10), arguments),
        (again.format(whole - (16 << 10)), arguments),
        (again.format(whole + lock - 4096), arguments),
        (again.format(whole + lock), arguments),
    )
    first, *rest, last = outcomes
    assert first[0] == 6 and "of disk are needed, 0.06 MB are free" in first[1][-1]
    assert len(first[1]) == 1 and first[2] == []
    for (code, err, there), name in zip(rest, ("model.safetensors", "config.json"), strict=True):
        assert code == 6 and there == []
        assert "needs 0.16 MB of disk, 0." in err[0], "need and free, before work"
        assert err[1].startswith("mlxlora: ") and f"{name}: cannot be written: No space left" in err[1]
    assert last[0] == 0
    assert last[2] == ["model", "model/config.json", "model/model.safetensors", "model/tokenizer.model"]


def test_a_disk_that_fills_in_any_part_of_an_export(tmp_path: Path, tiny_model: Path) -> None:
    """A little too small for all that is known before; for the tokenizer; for what is written last."""
    place, whole = tmp_path / "disk", tmp_path / "whole"
    place.mkdir()
    arguments = ["export", "--to", "hf", "--model", tiny_model, "--out"]
    assert cli.execute(list(map(str, [*arguments, whole]))) == 0
    size, lock = bytes_on_disk(whole), 4096
    mount = "mount -t tmpfs -o size={} none " + str(place)
    again = "mount -o remount,size={} " + str(place)
    outcomes = inside(
        place,
        (mount.format(64 << 10), [*arguments, place / "out"]),
        (again.format(size - (20 << 10)), [*arguments, place / "out"]),
        (again.format(size + lock - 4096), [*arguments, place / "out"]),
        (again.format(size + lock), [*arguments, place / "out"]),
    )
    first, *rest, last = outcomes
    assert first[0] == 6 and "of disk are needed, 0.06 MB are free" in first[1][-1] and first[2] == []
    for code, err, there in rest:
        assert code == 6 and there == []
        assert "cannot be written: No space left" in err[-1]
    assert last[0] == 0 and set(last[2]) == {"out", *(f"out/{path.name}" for path in whole.iterdir())}


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Inputs that are not there would be another error."""
    place = tmp_path / "disk"
    place.mkdir()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[run]\nfolder = "{place}/run"\n[model]\nmlx_path = "{tmp_path}/none"\n'
        f'[data]\nuse = "jsonl"\noptions = {{path = "{tmp_path}/none"}}\n'
    )
    protect = f"mount --bind {place} {place} && mount -o remount,bind,ro {place}"
    outcomes = inside(
        place,
        (protect, ["convert", "--torch-path", tmp_path / "none", "--mlx-path", place / "model"]),
        ("true", ["data", "--builder", "jsonl", "--set", f"path={tmp_path}/none", "--out", place / "rows"]),
        ("true", ["train", "--model", tmp_path / "none", "--adapter-file", place / "a.safetensors"]),
        ("true", ["fuse", "--adapter-file", tmp_path / "none", "--save-path", place / "fused"]),
        ("true", ["export", "--to", "hf", "--model", tmp_path / "none", "--out", place / "out"]),
        ("true", ["run", recipe]),
    )
    for code, err, there in outcomes:
        assert (code, there, len(err)) == (6, [], 1)
        assert "Read-only file system. Fix: name a place that can be written" in err[0]


#: a verb in a process that has 40 MB of addresses left once the function named by sys.argv[1] is called
LITTLE = """
import resource, sys
from mlxlora_core import cli
from mlxlora_core.model import generate, loading
name = sys.argv.pop(1)
function = getattr(loading, name)
def limited(*arguments):
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (40 << 20),) * 2)
    return function(*arguments)
setattr(loading, name, limited)
raise SystemExit(cli.execute(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("function", "told"),
    [("load", "the model needs about "), ("_fill", "the rest of the model needs about ")],
    ids=["before it is read", "when others took meanwhile what was free"],
)
def test_a_model_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, make_checkpoint: Callable[..., Path], function: str, told: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dim=512, n_layers=8)
    model = tmp_path / "model"
    assert cli.execute(["convert", "--torch-path", str(checkpoint), "--mlx-path", str(model)]) == 0
    arguments = ["generate", "-P", "no:openblas", "--model", str(model), "-p", "A layer"]
    done = subprocess.run(
        [sys.executable, "-c", LITTLE, function, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 6, done.stderr
    (line,) = done.stderr.splitlines()
    assert told in line and " of addresses (ulimit -v) in all, " in line
    assert "MB can be had. Fix: use a smaller model" in line


#: a verb in a process that has the file numbers below sys.argv[1] alone
FEW = """
import resource, sys
from mlxlora_core import cli
from mlxlora_core.runs import pipeline
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
raise SystemExit(cli.execute(sys.argv[1:]))
"""


@pytest.mark.parametrize("limit", [3, 4, 5, 6])
def test_too_few_files_is_one_line_or_enough(tmp_path: Path, tiny_rows: Path, limit: int) -> None:
    arguments = ["data", "--builder", "jsonl", "--set", f"path={tiny_rows}", "--out", str(tmp_path / "rows")]
    command = [sys.executable, "-c", FEW, str(limit), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        assert limit > 4 and (tmp_path / "rows" / "dataset.json").is_file()
    else:
        assert done.returncode == 6
        assert "Too many open files" in done.stderr.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("calls", "error", "words"),
    [("fsync", "EIO", "Input/output error"), ("rename,renameat,renameat2", "EACCES", "Permission denied")],
)
def test_a_disk_that_fails_under_a_folder_leaves_none(
    tmp_path: Path, tiny_rows: Path, calls: str, error: str, words: str
) -> None:
    """strace makes the calls fail, whoever in mlxlora makes them."""
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={calls}:error={error}"]
    command += [sys.executable, "-m", "mlxlora_core", "data", "--builder", "jsonl"]
    command += ["--set", f"path={tiny_rows}", "--out", str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 6, done.stderr
    assert f"cannot be written: {words}. Fix: " in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
