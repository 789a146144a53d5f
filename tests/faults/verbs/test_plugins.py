"""Catalogue 115, 116, 119: plugins that hang, and plugins whose functions give what they should not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxlora_core import cli

PLUGIN = """
from mlxlora_core.api import Adapter, DatasetBuilder, Quantizer, Rows, Sampler, hookimpl

@hookimpl
def mlxlora_samplers():
    return [Sampler(name="odd", summary="odd", build=lambda options: {value})]

@hookimpl
def mlxlora_dataset_builders():
    build = lambda options: {value}
    return [DatasetBuilder(name="odd", summary="odd", build=build, inputs=lambda o: {{}})]

@hookimpl
def mlxlora_adapters():
    wrap = lambda linear, place, options: {value}
    return [Adapter(name="odd", summary="odd", wrap=wrap, fuse=lambda m, w: w)]

@hookimpl
def mlxlora_quantizers():
    quantize = lambda weight, options: {value}
    dequantize = lambda parts, options: parts["weight"]
    return [
        Quantizer(name="odd", summary="odd", parts=("weight",), quantize=quantize, dequantize=dequantize)
    ]
"""

GENERATE = "generate --model MODEL -p A -n 2 --sampler odd"
DATA = "data --builder odd --out OUT"
TRAIN = "train --model MODEL --data ROWS --adapter odd --iters 1 --adapter-file OUT/a.npz"
CONVERT = "convert --torch-path CHECKPOINT --mlx-path OUT -q odd"
CASES = {
    "a sampler of nothing": (GENERATE, "None", "sampler odd:odd: build gives NoneType, wanted a function"),
    "too many arguments": (
        GENERATE,
        "lambda a, b, c: a",
        "build gives a function (a, b, c), wanted a function (logits, tokens)",
    ),
    "too few arguments": (
        GENERATE,
        "lambda a: a",
        "build gives a function (a), wanted a function (logits, tokens)",
    ),
    "no logits": (GENERATE, "lambda *_: None", "sampler odd:odd: transform gives NoneType, wanted array"),
    "a word": (GENERATE, "lambda *_: 'x'", "sampler odd:odd: transform gives str, wanted array"),
    "a token": (GENERATE, "lambda x, _: x.argmax()", "transform gives uint32 (), wanted float32 (1, 320)"),
    "another shape": (GENERATE, "lambda x, _: x[0]", "transform gives float32 (320,), wanted float32 (1, 32"),
    "not a number": (GENERATE, "lambda x, _: x * float('nan')", "sampler odd:odd: transform gives nan"),
    "infinity": (GENERATE, "lambda x, _: x + float('inf')", "sampler odd:odd: transform gives inf"),
    "no token left": (GENERATE, "lambda x, _: x - float('inf')", "gives no token that may come (all logits"),
    "no rows": (DATA, "None", "builder odd:odd: build gives NoneType, wanted Rows"),
    "a list of rows": (DATA, "[1]", "builder odd:odd: build gives list, wanted Rows"),
    "rows of numbers": (DATA, "Rows([1])", "builder odd:odd: build gives int, wanted Row"),
    "no module": (TRAIN, "None", "adapter odd:odd: wrap gives None for layers.0"),
    "the same module": (TRAIN, "linear", "adapter odd:odd: wrap gives a Linear without the linear"),
    "the weight as it is": (
        CONVERT,
        "{'weight': weight}",
        "quantizer odd:odd: dequantize gives (16, 32) float16, wanted (16, 32) float32",
    ),
    "no parts": (CONVERT, "weight", "quantizer odd:odd: quantize gives array, wanted a mapping of its parts"),
    "other parts": (CONVERT, "{'q': weight}", "quantizer odd:odd: quantize gives parts q, wanted weight"),
    "an exception": (DATA, "1 / 0", "plugin odd (file) failed in build of builder 'odd': ZeroDivisionError"),
    "an exit": (DATA, "exit(0)", "plugin odd (file) failed in build of builder 'odd': it called sys.exit(0)"),
    "an exit later": (GENERATE, "lambda *_: exit(0)", "plugin odd (file) failed: it called sys.exit(0)"),
    "an exception later": (GENERATE, "lambda *_: 1 / 0", "plugin odd (file) failed: ZeroDivisionError"),
}


@pytest.mark.parametrize(("line", "value", "words"), CASES.values(), ids=CASES)
def test_what_a_function_should_not_give_is_8_and_names_it(
    tmp_path: Path,
    tiny_model: Path,
    tiny_checkpoint: Path,
    tiny_rows: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    value: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(PLUGIN.format(value=value))
    places = {"MODEL": tiny_model, "CHECKPOINT": tiny_checkpoint, "ROWS": tiny_rows, "OUT": tmp_path / "out"}
    for name, place in places.items():
        line = line.replace(name, str(place))
    verb, *rest = line.split()
    capfd.readouterr()
    assert cli.execute([verb, "-P", "./odd.py", *rest]) == 8
    err = capfd.readouterr().err
    assert words in err and "Traceback" not in err
    assert not list((tmp_path / "out").rglob("*"))


EXPORTER = """
from mlxlora_core.api import Exporter, hookimpl

def export(source, target, options):
    (target / "half").write_bytes(b"x")
    {body}

@hookimpl
def mlxlora_exporters():
    return [Exporter(name="odd", summary="odd", export=export)]
"""


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("1 / 0", 8, "plugin odd (file) failed in export of exporter 'odd': ZeroDivisionError"),
        ("exit(0)", 8, "plugin odd (file) failed in export of exporter 'odd': it called sys.exit(0)"),
        ("return target", 8, "exporter odd:odd: export gives PosixPath, wanted None"),
        ("(target / 'half').unlink()", 8, "exporter odd:odd: export gives no file, wanted at least one file"),
        ("raise OSError(28, 'No space left')", 6, "No space left"),
        (
            "from mlxlora_core.api import ModelError; raise ModelError('no place for it')",
            4,
            "no place for it",
        ),
    ],
)
def test_an_exporter_that_fails_is_named_and_leaves_nothing(
    tmp_path: Path,
    tiny_model: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(EXPORTER.format(body=body))
    command = ["export", "-P", "./odd.py", "--to", "odd", "--model", str(tiny_model), "--out", "out"]
    assert cli.execute(command) == code
    last = capfd.readouterr().err.splitlines()[-1]
    assert words in last
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name and path.suffix != ".lock"]


def test_a_plugin_that_hangs_can_be_left_out(tmp_path: Path) -> None:
    """Its import never ends: help and verbs without it work, and Ctrl-C ends the others."""
    site = tmp_path / "site"
    (site / "hangs-1.dist-info").mkdir(parents=True)
    (site / "hangs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: hangs\nVersion: 1\n")
    (site / "hangs-1.dist-info" / "entry_points.txt").write_text("[mlxlora]\nhangs = hangs\n")
    (site / "hangs.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\ntime.sleep(600)\n"
    )
    command = ["env", "-u", "MLXLORA_PLUGINS", f"PYTHONPATH={site}", sys.executable, "-m", "mlxlora_core"]

    def run(*arguments: str, env: str = "A=") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command[:3], env, *command[3:], *arguments], capture_output=True, text=True, timeout=30
        )

    assert run("--help").returncode == 0
    assert run("train", "--help").returncode == 0
    left_out = run("plugins", "-P", "no:hangs", "--json")
    assert {p["name"]: p["status"] for p in json.loads(left_out.stdout)}["hangs"] != "active"
    assert run("components", env="MLXLORA_PLUGINS=").returncode == 0
    assert not (tmp_path / "mark").exists()
    with subprocess.Popen([*command, "components"], stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "mark").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "mlxlora: interrupted\n")
