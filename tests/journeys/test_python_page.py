"""The page on Python is a program that runs from its top to its end, and the notebook is that page."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mlxlora_core

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "python.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

RECIPE = """
[run]
folder = "run"

[model]
mlx_path = "model-folder"

[data]
use = "jsonl"
options = { path = "data-folder" }

[generate]
prompts = ["A layer"]
num_tokens = 4
"""


def test_the_page_runs_from_top_to_bottom(
    mlxlora: Callable[..., Any],
    tiny_checkpoint: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mlxlora("convert", "--torch-path", tiny_checkpoint, "--mlx-path", "model-folder")
    assert done.code == 0, done.err
    shutil.copytree(tiny_data, "data-folder")
    Path("recipe.toml").write_text(RECIPE)
    names: dict[str, Any] = {}
    said = []
    for number, block in enumerate(BLOCKS, start=1):
        exec(compile(block, f"block {number} of python.md", "exec"), names)
        said.append(capfd.readouterr().out)
    first, tuned, rows, resumed, streamed, ended, asked, *rest = said
    scored, several, fused, exported, run, listed, error = rest
    assert "step 200  loss " in first and "\n200 steps on 40 rows, train loss " in first
    assert tuned == "<mlxlora model 'model-folder', adapter lora>\n"
    assert rows.startswith("10 steps on 2 rows, train loss ")
    assert "resumed at step 10 of 30\n" in resumed and "\n30 steps on 40 rows" in resumed
    assert Path("long.npz").is_file() and Path("relu.safetensors").is_file()
    assert streamed.splitlines()[-1].endswith(("stop", "length"))
    assert "\n\n" not in ended.rstrip("\n") and asked.strip()
    assert scored.startswith("{'exact-match': ") and scored.count("Q: What is") == 2
    assert several.startswith("(3, 3, ")
    assert fused.startswith("4 ") and Path("fused-folder", "config.json").is_file()
    assert "'model.safetensors'" in exported and Path("hf-folder", "config.json").is_file()
    assert "rounded=0" in exported
    assert "StageDone(stage='train'" in run and Path("run", "report.html").is_file()
    assert "'greedy'" in listed and "lora active" in listed
    assert error == "train: learning_rate: must be more than 0, got -1.0\n"


def test_the_page_names_every_function_and_every_error() -> None:
    public = {name for name in mlxlora_core.__all__ if name not in ("Model", "errors")}
    assert {name for name in public if f"mlxlora.{name}" not in PAGE and f"`{name}`" not in PAGE} == set()
    told = re.findall(r"^\| `(\w+Error)` \|", PAGE, re.MULTILINE)
    assert told == [cls.__name__ for cls in mlxlora_core.errors.MlxloraError.__subclasses__()]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """docs/make_notebook.py."""
    spec = importlib.util.spec_from_file_location("make_notebook", DOCS / "make_notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_the_page(maker: ModuleType) -> None:
    assert (DOCS / "python.ipynb").read_text("utf-8") == maker.text(), "run: python docs/make_notebook.py"
    notebook = json.loads(maker.text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    code = ["".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"]
    assert code == BLOCKS
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell
    )
    assert len({cell["id"] for cell in cells}) == len(cells)
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "## Errors" in prose and "```python" not in prose


def test_a_notebook_that_is_out_of_date_is_told(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maker, "PAGE", tmp_path / "python.md")
    monkeypatch.setattr(maker, "NOTEBOOK", tmp_path / "python.ipynb")
    (tmp_path / "python.md").write_text(PAGE)
    monkeypatch.setattr("sys.argv", ["make_notebook.py", "--check"])
    assert maker.main() == 1 and not (tmp_path / "python.ipynb").exists()
    monkeypatch.setattr("sys.argv", ["make_notebook.py"])
    assert maker.main() == 0
    monkeypatch.setattr("sys.argv", ["make_notebook.py", "--check"])
    assert maker.main() == 0
    (tmp_path / "python.md").write_text(PAGE + "\nMore.\n")
    assert maker.main() == 1
