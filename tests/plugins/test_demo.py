"""The embedded base model is what its card says, and the demo recipe tunes it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlxlora_demo
import pytest

from mlxlora_core import cli
from mlxlora_core.tokenizer import Tokenizer

FOLDER = Path(mlxlora_demo.__file__).parent
BASE = FOLDER / "base"


def test_the_files_are_those_of_the_card_and_small() -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text()
    stated = dict(re.findall(r"`([\w.]+)` \| [\d ]+ \| `([0-9a-f]{64})`", card))
    files = {path.name: path for path in BASE.iterdir()}
    assert stated.keys() == files.keys() == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    assert stated == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert sum(path.stat().st_size for path in files.values()) <= 12e6


def test_the_tokenizer_gives_any_text_back() -> None:
    tokenizer = Tokenizer(BASE / "tokenizer.model")
    for text in (
        "Q: What is ReLU in mlx?\nA: mlx.nn.ReLU",
        "    indented\n\n\ttab",
        "naïve 日本 🙂",
        "``mx.maximum(x, 0)``",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_base_has_not_seen_mlx() -> None:
    script = (FOLDER / "pretrain.py").read_text()
    assert '"mlx" not in text.lower()' in script
    assert "mlx" not in (FOLDER / "corpus-requirements.txt").read_text()


Run = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def short_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the demo for a few steps; what it prints, and run.json."""

    def run(*more: str) -> tuple[str, dict[str, Any]]:
        sets = {"train.iters": 12, "train.steps_per_eval": 12, "train.warmup": 2, "generate.num_tokens": 8}
        sets |= {"evaluate.test_batches": 2, "train.val_batches": 2, "run.folder": tmp_path / "run"}
        arguments = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        assert cli.execute(["run", *arguments, *more]) == 0
        return capfd.readouterr().out, json.loads((tmp_path / "run" / "run.json").read_text())

    return run


@pytest.mark.parametrize("more", [(), ("--set", "quantize.use=affine", "--set", "quantize.options.bits=4")])
def test_a_short_demo_lowers_the_held_out_loss(short_run: Run, more: tuple[str, ...]) -> None:
    out, record = short_run(*more)
    results = [record["stages"][stage]["result"] for stage in ("before", "after")]
    before, after = (result["losses"]["test"]["loss"] for result in results)
    assert after < 0.95 * before
    assert "What is ReLU in mlx?" in out and "before:" in out and "after:" in out
