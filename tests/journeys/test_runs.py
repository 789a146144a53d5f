"""``mlxlora runs``: what there is, beside each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_run import write_run

Mlxlora = Callable[..., Any]


def test_runs_beside_each_other(mlxlora: Mlxlora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    none = mlxlora("runs")
    assert (none.code, none.out) == (0, "") and "no run folder here" in none.err
    wrong = mlxlora("runs", "nowhere")
    assert (wrong.code, wrong.out, wrong.err) == (3, "", "mlxlora: nowhere: there is no such folder\n")
    write_run(Path("a"), name="first", steps=20)
    write_run(Path("b"), name="second", steps=40, done=3)
    Path("bad").mkdir()
    Path("bad", "run.json").write_text("{")
    found = mlxlora("runs")
    assert found.code == 0 and found.err == ""
    rows = [line.split() for line in found.out.splitlines()]
    assert rows[1][:4] == ["a", "first", "done", "20/20"]
    assert rows[2][:4] == ["b", "second", "interrupted", "40/40"]
    assert rows[3][:3] == ["bad", "-", "damaged:"]
    assert ["train.iters", "20", "40"] in rows and not any("learning_rate" in line for line in rows[4:])
    told = json.loads(mlxlora("runs", "--json", "a", "bad").out)
    assert [run["state"] for run in told] == ["done", "damaged"]
    assert told[0]["trained_tokens"] == 8000 and told[0]["settings"]["train.iters"] == 20


def test_it_loads_nothing_heavy(tmp_path: Path) -> None:
    write_run(tmp_path / "a", steps=20)
    code = (
        "import sys; from mlxlora_core import cli; cli.execute(['runs', sys.argv[1]]); "
        "print([m for m in ('mlx', 'numpy', 'starlette', 'wandb', 'tensorboardX') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
