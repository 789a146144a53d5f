"""No process that mlxlora starts looks for modules in the folder that it is started in.

The suite takes the verbs that import most, each its own part; ``MLXLORA_TEST_ALL=1`` takes all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxlora_core import cli
from mlxlora_core.machine.children import safe_environment, safe_python

#: what any verb may import, though not in this process
ALSO = {"statistics", "decimal", "random", "subprocess", "mlx", "numpy", "torch", "griffe", "csv", "email"}

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
EVERYDAY = ("convert", "data", "doctor", "generate", "run", "train")
VERBS = {
    "doctor": "",
    "plugins": "",
    "components": "",
    "options": "sampler top-p",
    "convert": "--torch-path $CHECKPOINT --mlx-path $OUT/model",
    "data": "--builder docstrings --package pluggy --out $OUT/rows",
    "train": "--model $MODEL --data $ROWS --adapter-file $OUT/a.safetensors --iters 1 --observer csv",
    "evaluate": "--model $MODEL --data $ROWS",
    "generate": "--model $MODEL -p A -n 2",
    "fuse": "--model $MODEL --adapter-file $ADAPTER --save-path $OUT/fused",
    "export": "--model $MODEL --to npz --out $OUT/export",
    "run": "demo --dry-run",
    "report": "$OUT/none",
}


@pytest.mark.parametrize("verb", VERBS if ALL else EVERYDAY)
def test_a_module_that_lies_around_is_not_run(
    tmp_path: Path,
    tiny_checkpoint: Path,
    tiny_model: Path,
    tiny_rows: Path,
    tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    out, here = tmp_path / "out", tmp_path / "here"
    out.mkdir()
    here.mkdir()
    places = {"$CHECKPOINT": tiny_checkpoint, "$MODEL": tiny_model, "$ROWS": tiny_rows}
    line = VERBS[verb]
    for name, path in {**places, "$ADAPTER": tiny_adapter, "$OUT": out}.items():
        line = line.replace(name, str(path))
    monkeypatch.setenv("MLXLORA_PLUGINS", "")
    monkeypatch.chdir(tmp_path)
    assert cli.execute([verb, *line.split()]) in (0, 3, 5)
    names = {name.partition(".")[0] for name in sys.modules} | ALSO
    assert len(names) > 100
    for name in names - {"__main__"}:
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    for path in out.iterdir():
        path.rename(tmp_path / f"before-{path.name}")
    # As the installed script is, in a folder of its own.
    (out / "mlxlora").write_text("from mlxlora_core.cli import main\nmain()\n")
    done = subprocess.run(
        [sys.executable, str(out / "mlxlora"), verb, *line.split()],
        cwd=here, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert done.returncode in (0, 3, 5), done.stderr


@pytest.mark.parametrize("path", [None, ":", ":/nowhere"])
def test_neither_does_python_m_once_it_has_found_us(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    """Python itself looks there for what -m names, and for what it needs to find that."""
    here, empty = tmp_path / "here", tmp_path / "empty"
    here.mkdir()
    empty.mkdir()
    (empty / "__main__.py").write_text("import sys; print(*sys.modules)")
    listed = subprocess.run([sys.executable, "-m", "empty"], cwd=tmp_path, capture_output=True, text=True)
    needed = {name.partition(".")[0] for name in listed.stdout.split()}
    assert "runpy" in needed
    ours = {"click", "pluggy", "rich", "numpy", "mlx", "mlxlora_lora"}
    for name in (ours | sys.stdlib_module_names) - needed:
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    command = [sys.executable, "-m", "mlxlora_core", "generate", "--model", str(tiny_model), "-p", "A"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert done.returncode == 0, done.stderr


def test_the_script_looks_into_no_folder_that_an_empty_entry_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python reads its standard library there before it comes to the script; that much is its own."""
    here, script = tmp_path / "here", tmp_path / "bin" / "mlxlora"
    here.mkdir()
    script.parent.mkdir()
    script.write_text("from mlxlora_core.cli import main\nmain()\n")
    for name in ("click", "pluggy", "rich", "numpy", "mlx", "mlxlora_lora", "tomllib"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    monkeypatch.setenv("PYTHONPATH", ":/nowhere")
    done = subprocess.run([sys.executable, script, "plugins"], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr
    monkeypatch.setenv("PYTHONPATH", str(here))  # which is the user's word for it
    subprocess.run([sys.executable, script, "plugins"], cwd=here, capture_output=True, text=True)
    assert (tmp_path / "ran").exists()


def test_an_entry_point_that_lies_around_is_no_plugin(tmp_path: Path) -> None:
    (tmp_path / "evil-1.dist-info").mkdir()
    (tmp_path / "evil-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    (tmp_path / "evil-1.dist-info" / "entry_points.txt").write_text("[mlxlora]\nevil = evil\n")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    command = ["env", "-u", "MLXLORA_PLUGINS", sys.executable, "-m", "mlxlora_core", "plugins"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "evil" not in done.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["", ":", ":/nowhere", "/nowhere:", "/a::/b"])
def test_an_empty_entry_of_the_path_is_not_where_a_child_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", path)
    (tmp_path / "planted.py").touch()
    done = subprocess.run(
        safe_python("-c", "import planted"), env=safe_environment(), cwd=tmp_path, capture_output=True
    )
    assert b"No module named 'planted'" in done.stderr
