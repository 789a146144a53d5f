"""The embedded base model is what its card says, and the demo recipe tunes it.

The suite trains it on batches of two; ``MLXLORA_TEST_ALL=1`` on those of the recipe, and as QLoRA too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlxlora_demo
import pytest
from mlxlora_sentencepiece.tokenizer import SentencePieceTokenizer
from pretrain import REQUIREMENTS, documents

import mlxlora_core
from mlxlora_core import cli

FOLDER = Path(mlxlora_demo.__file__).parent
BASE = FOLDER / "base"
ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")


def test_the_files_are_those_of_the_card_and_small() -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text()
    stated = dict(re.findall(r"`([\w.]+)` \| [\d ]+ \| `([0-9a-f]{64})`", card))
    files = {path.name: path for path in BASE.iterdir()}
    assert stated.keys() == files.keys() == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    assert stated == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert sum(path.stat().st_size for path in files.values()) <= 12e6


def test_the_wheel_holds_the_same_files(tmp_path: Path) -> None:
    root = Path(mlxlora_core.__file__).parents[1]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    without = {**os.environ, "CC": "false"}  # the library is no matter of this test
    subprocess.run(build, cwd=root, env=without, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    shipped = [*BASE.iterdir(), *FOLDER.glob("*.toml"), *FOLDER.glob("*.jsonl"), FOLDER / "MODEL_CARD.md"]
    shipped += [
        path for path in (root / "mlxlora_core" / "runs" / "report").rglob("*") if path.suffix != ".pyc"
    ]
    for path in (path for path in shipped if path.is_file()):
        name = path.relative_to(root).as_posix().removeprefix("plugins/")
        assert held[name] == hashlib.sha256(path.read_bytes()).hexdigest(), name


def test_what_shows_forgetting_is_not_trained_on() -> None:
    def questions(name: str) -> set[str]:
        rows = [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]
        return {row["messages"][0]["content"] for row in rows}

    recipe = tomllib.loads((FOLDER / "smollm2.toml").read_text("utf-8"))
    replayed, general = questions(recipe["data"]["extra_rows"]), questions(recipe["evaluate"]["general_rows"])
    assert len(replayed) == 32 and not replayed & (general | set(recipe["generate"]["prompts"]))


def test_the_tokenizer_gives_any_text_back() -> None:
    tokenizer = SentencePieceTokenizer(BASE / "tokenizer.model")
    for text in (
        "Q: What is ReLU in mlx?\nA: mlx.nn.ReLU",
        "    indented\n\n\ttab",
        "naïve 日本 🙂",
        "``mx.maximum(x, 0)``",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_corpus_leaves_out_what_mentions_mlx(tmp_path: Path) -> None:
    (tmp_path / "quoted").mkdir()
    (tmp_path / "quoted" / "__init__.py").write_text(
        '"""A package that knows of others."""\n\n\n'
        'def convert(x):\n    """Turn an array of MLX into one of ours."""\n\n\n'
        'def ours(x):\n    """Turn anything else into one of ours."""\n'
    )
    texts = [document.text for document in documents(tmp_path, "quoted")]
    assert sorted(texts) == ["A package that knows of others.", "Turn anything else into one of ours."]
    assert "mlx" not in REQUIREMENTS.read_text()


Run = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def short_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the demo for a few steps; what it prints, and run.json."""

    def run(*more: str) -> tuple[str, dict[str, Any]]:
        sets = {"train.iters": 12, "train.steps_per_eval": 12, "train.warmup": 2, "generate.num_tokens": 8}
        sets |= {"evaluate.test_batches": 2, "train.val_batches": 2, "run.folder": tmp_path / "run"}
        sets |= {} if ALL else {"train.batch_size": 2, "generate.num_tokens": 2}
        arguments = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        assert cli.execute(["run", *arguments, *more]) == 0
        return capfd.readouterr().out, json.loads((tmp_path / "run" / "run.json").read_text())

    return run


QLORA = ("--set", "quantize.use=affine", "--set", "quantize.options.bits=4")


@pytest.mark.parametrize("more", [(), QLORA] if ALL else [()])
def test_a_short_demo_lowers_the_held_out_loss(short_run: Run, more: tuple[str, ...]) -> None:
    out, record = short_run(*more)
    results = [record["stages"][stage]["result"] for stage in ("before", "after")]
    before, after = (result["losses"]["test"]["loss"] for result in results)
    assert after < 0.95 * before
    # Twenty questions about training rows, each with its answers printed or kept; the base knows none.
    answers = results[0]["answers"]
    assert len(answers) == 20 and {answer["split"] for answer in answers} == {"train"}
    assert record["summary"]["questions"]["memory"]["first_sentence"]["before"] == 0
    assert all(answer["prompt"].split("\n")[0] in out for answer in answers)
    assert "before:" in out and "after:" in out
