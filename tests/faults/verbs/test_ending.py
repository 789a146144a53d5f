"""Catalogue 36, 104, 144: a signal ends any verb at once, and nothing half-done stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import Program, ended, wait_for

#: verb -> (arguments, where it is interrupted); $NAME is filled in
VERBS = {
    "convert": ("--torch-path $CHECKPOINT --mlx-path $FOLDER/out/model", ".safetensors."),
    "data": ("--builder jsonl --out $FOLDER/out/data --set path=$ROWS", "valid.jsonl."),
    "fuse": (
        "--model $MODEL --adapter-file $ADAPTER --save-path $FOLDER/out/fused",
        "model.safetensors.",
    ),
    "generate": ("--model $MODEL -p A", "tokenizer.model"),
    "evaluate": ("--model $MODEL --data $ROWS", "test.jsonl"),
}
CASES = [
    ("convert", signal.SIGINT),
    ("data", signal.SIGTERM),
    ("fuse", signal.SIGHUP),
    ("generate", signal.SIGINT),
    ("evaluate", signal.SIGTERM),
]


@pytest.fixture
def places(
    program: Program, tiny_checkpoint: Path, tiny_model: Path, tiny_adapter: Path, tiny_rows: Path
) -> dict[str, Path]:
    return {
        "$CHECKPOINT": tiny_checkpoint,
        "$MODEL": tiny_model,
        "$ADAPTER": tiny_adapter,
        "$ROWS": tiny_rows,
        "$FOLDER": program.folder,
    }


def filled(text: str, places: dict[str, Path]) -> list[str]:
    for name, path in places.items():
        text = text.replace(name, str(path))
    return text.split()


@pytest.mark.parametrize(("verb", "number"), CASES)
def test_a_signal_ends_a_verb_and_leaves_nothing(
    program: Program, places: dict[str, Path], verb: str, number: int
) -> None:
    arguments, place = VERBS[verb]
    done = program.run(verb, *filled(arguments, places), at=place, do=number)
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.splitlines()[-1] == "mlxlora: interrupted"
    assert "Traceback" not in done.stderr
    assert [path for path in program.folder.rglob("*") if path != program.watch] in (
        [],
        [program.folder / "out"],
    )


def test_children_that_read_packages_end_with_it(program: Program) -> None:
    package, note = program.folder / "hangs.py", program.folder / "pid"
    package.write_text(
        f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\nwhile True: time.sleep(9)\n"
    )
    process = program.start(
        "data", "--builder", "docstrings", "--package", "hangs", "--out", program.folder / "data",
        prefix=("env", f"PYTHONPATH={program.folder}"),
    )  # fmt: skip
    wait_for(lambda: note.exists() and note.read_text(), process)
    process.send_signal(signal.SIGTERM)
    done = ended(process)
    assert (done.returncode, done.stderr) == (143, "mlxlora: interrupted\n")
    child = int(note.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (program.folder / "data").exists()


#: sends itself a signal at the n-th import after main() has begun
IMPORTS = """
import os, signal, sys
from mlxlora_core.machine import signals
from mlxlora_core.cli import main

left = [int(sys.argv.pop(1))]

class Finder:
    def find_spec(self, name, path=None, target=None):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
main()
"""


@pytest.mark.parametrize("n", [1, 5, 30, 90])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(n: int) -> None:
    command = [sys.executable, "-c", IMPORTS, str(n), "components"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (130, "mlxlora: interrupted\n", "")


def test_almost_nothing_is_imported_before_signals_are_seen_to() -> None:
    """What Python prints in the time before is not ours to change, so that time must be short."""
    code = (
        "import sys; before = set(sys.modules); import mlxlora_core.cli; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60,
                          cwd=Path(__file__).parents[3])  # fmt: skip
    loaded: set[Any] = set(done.stdout.split())
    assert {"mlxlora_core.cli", "mlxlora_core.machine.signals"} <= loaded
    assert loaded & {"click", "pathlib", "typing", "re", "json", "mlxlora_core.errors"} == set()
