"""Catalogue 52, 70, 76, 77, 91: what happens around a training while it trains."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Program, ended

from mlxlora_core import cli

TRAIN = "--iters 12 --batch-size 2 --steps-per-report 3 --steps-per-eval 6 --save-every 100 --warmup 2"


def arguments(model: Path, rows: Path, adapter: Path) -> list[object]:
    """A training of twelve steps with three validations and no save on its way."""
    return ["train", "--model", model, "--data", rows, "--adapter-file", adapter, *TRAIN.split()]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of the training that nothing interrupts."""
    adapter = tmp_path_factory.mktemp("whole") / "a.safetensors"
    assert cli.execute([str(a) for a in arguments(tiny_model, tiny_rows, adapter)]) == 0
    return adapter.read_bytes()


@pytest.mark.parametrize(
    ("place", "number", "step"),
    [
        ("first gradient", signal.SIGHUP, 1),
        ("step", signal.SIGINT, 5),
        ("validation", signal.SIGTERM, 6),
        ("save", signal.SIGHUP, None),
        ("reading rows", signal.SIGTERM, None),
    ],
)
def test_a_signal_anywhere_in_a_training_loses_nothing(
    program: Program,
    tiny_model: Path,
    tiny_rows: Path,
    whole: bytes,
    place: str,
    number: int,
    step: int | None,
) -> None:
    at = {
        "first gradient": "value_and_grad():1",
        "step": "make_update():5",
        "validation": "_validate():2",
        "save": "MANIFEST.json.",
        "reading rows": "train.jsonl",
    }[place]
    adapter = program.folder / "a.safetensors"
    command = arguments(tiny_model, tiny_rows, adapter)
    done = program.run(*command, at=at, do=number)
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    kept = program.folder / "a.checkpoints"
    if place == "reading rows":  # there is nothing to save yet
        assert (done.returncode, last) == (128 + number, "mlxlora: interrupted")
        assert not list(kept.glob("*")) and not adapter.exists()
        again = program.run(*command)
    elif place == "save":  # of the last step: nothing is left to do but to write the adapter
        assert done.returncode in (0, 128 + number)
        again = program.run(*command, "--resume")
    else:
        assert done.returncode == 128 + number and not adapter.exists()
        assert [path.name for path in kept.glob("step-*")] == [f"step-{step:07}"]
        assert "--resume" in last
        again = program.run(*command, "--resume")
    assert again.returncode == 0, again.stderr
    assert adapter.read_bytes() == whole


def test_training_goes_on_when_nobody_reads_what_it_says(
    program: Program, tiny_model: Path, tiny_rows: Path, whole: bytes
) -> None:
    adapter = program.folder / "a.safetensors"
    command = [sys.executable, "-m", "mlxlora_core", *map(str, arguments(tiny_model, tiny_rows, adapter))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        while b"loss" not in process.stderr.readline():
            pass
        process.stderr.close()
        process.stdout.close()
        code = process.wait(60)
    assert code in (0, -signal.SIGPIPE), "at the end, with all done, a last word may find nobody"
    assert adapter.read_bytes() == whole


def test_a_folder_that_is_removed_meanwhile_is_made_again(
    program: Program, tiny_model: Path, tiny_rows: Path, whole: bytes
) -> None:
    adapter = program.folder / "out" / "a.safetensors"
    process = program.start(*arguments(tiny_model, tiny_rows, adapter), at="make_update():5")
    shutil.rmtree(adapter.parent)
    program.go_on()
    done = ended(process)
    assert done.returncode == 0, done.stderr
    assert adapter.read_bytes() == whole


def test_a_training_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    line = '{"text": "' + "A layer scales the weights. " * 400 + '"}\n'
    for name in ("train", "valid"):
        (rows / f"{name}.jsonl").write_text(line * 64)
    code = """
import resource, sys
from mlxlora_core import cli
from mlxlora_core.training import session
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (600 << 20),) * 2)
sys.exit(cli.execute(sys.argv[1:]))
"""
    flags = ["-P", "no:openblas", "--batch-size", "64"]
    command = arguments(tiny_model, rows, tmp_path / "a.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command), *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 6, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("mlxlora: training needs about ") and "MB can be had" in line
    assert "Fix: lower --batch-size, --max-seq-length or --lora-layers" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows"]


#: raises what MLX raises when a GPU gives up, at the fifth step
GIVES_UP = """
import sys
from mlxlora_core import cli
from mlxlora_core.training.update import Updates
make_update, left = Updates.make_update, [5]
def gives_up(*arguments):
    left[0] -= 1
    if left[0] == 0:
        raise RuntimeError("[METAL] Command buffer execution failed: {words}")
    return make_update(*arguments)
Updates.make_update = gives_up
sys.exit(cli.execute(sys.argv[1:]))
"""


@pytest.mark.parametrize("words", ["Insufficient Memory (00000008)", "Caused GPU Hang Error (00000003)"])
def test_a_gpu_that_gives_up_is_6_and_what_was_saved_goes_on(
    program: Program, tiny_model: Path, tiny_rows: Path, whole: bytes, words: str
) -> None:
    """The state in memory is not to be trusted after it, and is not saved."""
    adapter = program.folder / "a.safetensors"
    command = [*map(str, arguments(tiny_model, tiny_rows, adapter)), "--save-every", "2"]
    done = subprocess.run(
        [sys.executable, "-c", GIVES_UP.format(words=words), *command],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 6, done.stderr
    assert done.stderr.splitlines()[-1].startswith("mlxlora: ") and words in done.stderr
    kept = sorted(path.name for path in (program.folder / "a.checkpoints").glob("step-*"))
    assert kept[-1] == "step-0000004"
    assert program.run(*command, "--resume").returncode == 0
    assert adapter.read_bytes() == whole
