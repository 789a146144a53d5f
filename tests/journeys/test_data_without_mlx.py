"""``mlxlora data`` and the planning of a run where MLX is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("mlx", "numpy", "torch", "sentencepiece", "safetensors", "scipy_openblas32")

#: mlxlora in a process in which none of the heavy libraries can be imported
WITHOUT = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from mlxlora_core import cli
sys.exit(cli.execute(sys.argv[1:]))
"""


def without(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a verb where the heavy libraries are absent."""
    command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_these_libraries_are_absent_there(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n')
    done = without("evaluate", "--model", tmp_path, "--data", tmp_path)
    assert done.returncode == 2 and "MLX cannot be used" in done.stderr


@pytest.mark.parametrize("builder", ["jsonl", "docstrings"])
def test_a_dataset_folder_is_built(tmp_path: Path, tiny_data: Path, builder: str) -> None:
    sets = ("--set", f"path={tiny_data}") if builder == "jsonl" else ("--package", "click")
    done = without("data", "--builder", builder, *sets, "--out", tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows" / "dataset.json").read_text())["rows"]
    for split in ("train", "valid", "test"):
        lines = (tmp_path / "rows" / f"{split}.jsonl").read_text().splitlines()
        assert len(lines) == rows[split] > 0
        assert all(json.loads(line).keys() == {"text"} for line in lines)
