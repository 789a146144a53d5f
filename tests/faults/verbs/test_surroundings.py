"""Catalogue 16, 94, 98, 99, 142, 143, 145: odd prompts and paths, and a machine that lacks something."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import cli

Capfd = pytest.CaptureFixture[str]


def said(capfd: Capfd, code: int, *arguments: object) -> tuple[str, str]:
    """stdout and stderr of a verb that ends with ``code``."""
    capfd.readouterr()
    got = cli.execute([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert got == code, err
    return out, err


# --- prompts and samplers -----------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "setting"),
    [
        ("temperature", "temp=inf"),
        ("temperature", "temp=nan"),
        ("temperature", "temp=-1"),
        ("top-p", "top_p=2"),
        ("top-p", "top_p=0"),
        ("min-p", "min_p=1.5"),
        ("top-k", "top_k=0"),
    ],
)
def test_a_sampler_out_of_range_is_2(tiny_model: Path, capfd: Capfd, sampler: str, setting: str) -> None:
    model = ("generate", "--model", tiny_model, "-p", "A", "--sampler", sampler)
    out, err = said(capfd, 2, *model, "--set", f"sampler.{setting}")
    assert out == "" and err.count("\n") == 1 and setting.partition("=")[0] in err


def test_temperature_zero_ends_after_so_many_tokens(tiny_model: Path, capfd: Capfd) -> None:
    said(capfd, 0, "generate", "--model", tiny_model, "-p", "A", "--temp", 0, "-n", 3)


@pytest.mark.parametrize(
    "prompt", ["", "<s></s><unk>", "\x00\x1b[2J", "é" * 50], ids=["empty", "special", "control", "é"]
)
def test_any_text_can_be_continued(tiny_model: Path, capfd: Capfd, prompt: str) -> None:
    out, _ = said(capfd, 0, "generate", "--model", tiny_model, "-p", prompt, "-n", 2, "--json")
    assert json.loads(out)["prompt"] == prompt


def test_half_a_surrogate_pair_in_the_prompt_is_2(tiny_model: Path, capfd: Capfd) -> None:
    _, err = said(capfd, 2, "generate", "--model", tiny_model, "-p", "a\udcff")
    assert "half a surrogate pair" in err


def test_a_prompt_without_end_on_stdin_is_refused(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "mlxlora_core", "generate", "--model", str(tiny_model), "-p", "-"]
    with open("/dev/zero", "rb") as zeros:
        done = subprocess.run(command, stdin=zeros, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "mlxlora: stdin holds more than 16 MiB. Fix: shorten the prompt\n"


def test_an_adapter_that_changes_nothing_is_told(
    tmp_path: Path, tiny_model: Path, tiny_adapter: Path, capfd: Capfd
) -> None:
    import mlx.core as mx

    from mlxlora_core.files import tensor_file

    tensors, metadata = tensor_file.load(tiny_adapter)
    zero = [(n, mx.zeros_like(t) if n.endswith("lora_b") else t) for n, t in sorted(tensors.items())]
    assert any(not tensor.any() for _, tensor in zero)
    kept = {key: value for key, value in metadata.items() if key != tensor_file.FINGERPRINT}
    tensor_file.save(tmp_path / "zero.safetensors", zero, kept, len(zero))
    arguments = ("--model", tiny_model, "--save-path", tmp_path / "fused")
    _, err = said(capfd, 0, "fuse", *arguments, "--adapter-file", tmp_path / "zero.safetensors")
    assert "warning: the adapter changes nothing" in err
    _, err = said(capfd, 0, "fuse", *arguments, "--adapter-file", tiny_adapter, "--overwrite")
    assert "warning" not in err


def test_rows_that_are_cut_are_told_with_the_share_that_is_lost(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path, capfd: Capfd
) -> None:
    arguments = ("--data", tiny_rows, "--adapter-file", tmp_path / "a.npz", "--iters", 1)
    _, err = said(capfd, 0, "train", "--model", tiny_model, *arguments, "--max-seq-length", 10)
    assert "warning: 8 train rows were cut at " in err and "% of all tokens are lost" in err


# --- paths and surroundings ---------------------------------------------------


@pytest.mark.parametrize("name", ["two words", "emoji 🙂 é", "new\nline", "-dash", "a'b\"c$d,[x]"])
def test_odd_names_of_folders(tmp_path: Path, tiny_rows: Path, capfd: Capfd, name: str) -> None:
    rows = shutil.copytree(tiny_rows, tmp_path / name / "rows")
    out = tmp_path / name / "out"
    said(capfd, 0, "data", "--builder", "jsonl", "--set", f"path={rows}", "--out", out)
    assert json.loads((out / "dataset.json").read_text("utf-8"))["options"]["path"] == str(rows)
    _, err = said(capfd, 5, "data", "--builder", "jsonl", "--set", f"path={tiny_rows}", "--out", out)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["x" * 300, "/".join(["x" * 200] * 30), "absent/" + "x" * 300], ids=["name", "path", "in none"]
)
def test_a_path_that_is_too_long_is_bad_input(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path, capfd: Capfd, name: str
) -> None:
    place, rows = tmp_path / name, f"path={tiny_rows}"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\nmlx_path = "{place}"\n[data]\nuse = "jsonl"\noptions.path = "{tiny_rows}"\n')
    for arguments in (
        ("data", "--builder", "jsonl", "--set", rows, "--out", place),
        ("data", "--builder", "jsonl", "--set", f"path={place}", "--out", tmp_path / "out"),
        ("generate", "--model", place, "-p", "A"),
        ("run", place),
        ("run", recipe),
        ("run", recipe, "--set", f"model.mlx_path={tiny_model}", "--set", f"run.folder={place}"),
        ("report", place),
    ):
        _, err = said(capfd, 2, *arguments)
        assert err.count("\n") == 1 and "File name too long" in err
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_name_that_leaves_no_room_for_a_lock_is_bad_input(
    tmp_path: Path, tiny_rows: Path, capfd: Capfd
) -> None:
    rows = ("data", "--builder", "jsonl", "--set", f"path={tiny_rows}")
    _, err = said(capfd, 2, *rows, "--out", tmp_path / ("x" * 252))
    assert err.endswith(": File name too long. Fix: choose a shorter name\n") and not [*tmp_path.iterdir()]


def run(*arguments: object, prefix: tuple[str, ...] = (), **variables: str) -> Any:
    """mlxlora in an environment of nothing but these variables."""
    kept = {name: os.environ[name] for name in ("PATH", "MLXLORA_THREADS", "TMPDIR") if name in os.environ}
    return subprocess.run(
        [*prefix, sys.executable, "-m", "mlxlora_core", *map(str, arguments)],
        env=kept | variables,
        capture_output=True,
        timeout=120,
    )


def test_no_home_and_the_plainest_locale(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    rows = shutil.copytree(tiny_rows, tmp_path / "é🙂")
    (rows / "test.jsonl").write_text('{"text": "é 漢 🙂"}\n', "utf-8")
    variables = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run("evaluate", "--model", tiny_model, "--data", rows, **variables)
    assert done.returncode == 0, done.stderr
    done = run("evaluate", "--model", tiny_model, "--data", rows / "absent", **variables)
    assert done.returncode == 3 and done.stderr.splitlines()[-1].startswith(b"mlxlora: ")


def test_arguments_that_are_no_utf8(tmp_path: Path, tiny_model: Path) -> None:
    command = [sys.executable, "-m", "mlxlora_core", "generate", "--model", str(tiny_model), "-p", b"a\xff"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    command = [sys.executable, "-m", "mlxlora_core", "generate", "--model", b"no\xff", "-p", "a"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 4 and done.stderr.count(b"\n") == 1


def test_without_mlx_one_line_says_what_to_install(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    done = run("generate", "--model", tiny_model, "-p", "A", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(b"mlxlora: MLX cannot be used: ") and done.stderr.count(b"\n") == 1
    assert b"pip install 'mlxlora[cpu]'" in done.stderr
    assert run("components", PYTHONPATH=str(tmp_path)).returncode == 0


def test_no_verb_needs_a_network(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    """A run and a dataset from packages in a network namespace that has nothing in it."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[run]\nfolder = "{tmp_path}/run"\n[model]\nmlx_path = "{tiny_model}"\n'
        f'[data]\nuse = "jsonl"\noptions = {{path = "{tiny_rows}"}}\n[train]\niters = 1\n'
        '[generate]\nprompts = ["A"]\nnum_tokens = 2\n'
    )
    alone = ("unshare", "-rn")
    done = run("run", recipe, prefix=alone)
    assert done.returncode == 0, done.stderr
    package = ("--package", "pluggy", "--out", tmp_path / "rows")
    done = run("data", "--builder", "docstrings", *package, prefix=alone)
    assert done.returncode == 0, done.stderr
