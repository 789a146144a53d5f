"""A base whose perplexity is too large for a number: told as such, and every JSON stays JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mlxlora_core import cli


def strictly(text: str) -> Any:
    """The value of JSON that any reader takes."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def hot(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint whose logits are thousands, and whose losses are above 710 nats, where exp overflows."""
    import torch

    folder = make_checkpoint(tmp_path / "hot")
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    tensors["output.weight"] = (tensors["output.weight"].float() * 3000).half()
    torch.save(tensors, folder / "consolidated.00.pth")
    return folder


def test_a_run_and_its_report(tmp_path: Path, hot: Path, tiny_data: Path, capsys: Any) -> None:
    recipe, folder = tmp_path / "hot.toml", tmp_path / "run"
    recipe.write_text(
        f'[model]\ntorch_path = "{hot}"\n[data]\nuse = "jsonl"\noptions = {{ path = "{tiny_data}" }}\n'
        "[train]\niters = 2\nbatch_size = 4\nsteps_per_report = 1\nsteps_per_eval = 1\n"
    )
    assert cli.execute(["run", str(recipe), "--set", f"run.folder={folder}", "--json"]) == 0
    assert strictly(capsys.readouterr().out)["summary"]
    record = strictly((folder / "run.json").read_text())
    loss = record["stages"]["before"]["result"]["losses"]["valid"]
    assert loss["loss"] > 710 and loss["perplexity"] is None and loss["perplexity_is"] == "infinite"
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        strictly(line)
    # What was read back is what was written: nothing is done again, and the page is whole.
    assert cli.execute(["run", str(recipe), "--set", f"run.folder={folder}", "--dry-run", "--json"]) == 0
    assert not any(strictly(capsys.readouterr().out)["stages"].values())
    assert cli.execute(["report", str(folder)]) == 0
    told = capsys.readouterr()
    assert "warning" not in told.err
    page = (folder / "report.html").read_text()
    assert f"{loss['loss']:.4f}" in page and "could not be read" not in page


def test_evaluate(tmp_path: Path, hot: Path, tiny_data: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    assert cli.execute(["convert", "--torch-path", str(hot), "--mlx-path", str(model)]) == 0
    asked = ["evaluate", "--model", str(model), "--data", str(tiny_data)]
    capsys.readouterr()
    assert cli.execute([*asked, "--json"]) == 0
    told = strictly(capsys.readouterr().out)
    assert told["loss"] > 710 and told["perplexity"] is None and told["perplexity_is"] == "infinite"
    assert cli.execute(asked) == 0
    assert "perplexity infinite" in capsys.readouterr().out
