"""mlxlora beside its peers on the same work, in one run.

    python benchmarks/peers.py --python PEERS/bin/python [--quick] [--json]

Peers live in an environment of their own, made by two commands::

    python3 -m venv PEERS
    PEERS/bin/pip install -r benchmarks/peers-requirements.txt

One set of random weights is written as a Meta checkpoint and as a Hugging Face
folder. For each kind of work every tool runs in a process of its own; before
anything is timed they must agree on the loss of the same tokens. Then they
take turns, a sample each, so that what else the machine does falls on all. The
first sample of each, which compiles and warms up, is not counted, unless it
takes so long that there is no other.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from mlxlora_openblas import sgemm
from workers import commands, contest, table
from workers.contest import TASKS, Entry, Group, Pace
from workers.environment import own_kernels
from workers.shapes import SHAPES, Shape
from workers.weights import HUGGING_FACE, META, ROWS

from mlxlora_core.errors import ResourceError
from mlxlora_core.machine import doctor
from mlxlora_core.machine.device import PRECISIONS

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGE = ROOT / "docs" / "performance.md"
DEMO = ROOT / "plugins" / "mlxlora_demo" / "base"
FULL = Pace(samples=7, budget_seconds=150.0, batch=4, prompt_tokens=512, new_tokens=64)
QUICK = Pace(samples=3, budget_seconds=20.0, batch=1, prompt_tokens=128, new_tokens=32)
KINDS = (*TASKS, "conversion", "start-up")


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--python", "peers", default=sys.executable, help="Python of the peers' environment.")
@click.option("--quick", is_flag=True, help="Fewer and shorter samples, and mlx-lm only with the same BLAS.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "--shape", "shapes", multiple=True, type=click.Choice([s.name for s in SHAPES]), help="Only these."
)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only this work.")
@click.option("--keep/--no-keep", default=True, help="Write benchmarks/results/ and docs/performance.md.")
def main(
    peers: str, quick: bool, as_json: bool, shapes: Sequence[str], kinds: Sequence[str], keep: bool
) -> None:
    """Measure, print, and keep the results."""
    own_kernels()
    check_environment(peers)
    device = doctor.device()
    chosen = [s for s in SHAPES if s.name in shapes or not (shapes or (s.needs_gpu and device.kind == "cpu"))]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "quick": quick,
        "machine": {
            "system": platform.platform(),
            "device": asdict(device),
            "threads": doctor.threads().count,
            "memory_bytes": doctor.memory().total_bytes,
        },
        "versions": {},
        "rates": {},
        "checks": [],
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="mlxlora-peers-") as folder:
        run = contest.Run(peers, QUICK if quick else FULL, device.kind == "cpu", result)
        result["rates"] = run.rates()
        for shape in chosen:
            _measure(run, shape, Path(folder) / shape.name, kinds or KINDS)
        if "start-up" in (kinds or KINDS):
            _start_up(run, Path(folder))
    table.compare(result["rows"])
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(table.text(result))
    if keep:
        _keep(result)


def check_environment(peers: str) -> None:
    """Refuse a Python that has no peers, with the commands that make one."""
    if shutil.which(peers) is None or not commands.has_modules(peers, ("mlx_lm", "transformers", "peft")):
        raise click.UsageError(
            f"{peers} has no peers; make an environment with: python3 -m venv PEERS && "
            "PEERS/bin/pip install -r benchmarks/peers-requirements.txt, and give --python PEERS/bin/python"
        )


def _measure(run: contest.Run, shape: Shape, folder: Path, kinds: Sequence[str]) -> None:
    """Everything about one shape."""
    folder.mkdir()
    asked = {"shape": shape.name, "folder": str(folder)}
    if shape.name == "embedded":
        asked["checkpoint"] = str(DEMO)
    run.worker_once(run.peers, "workers.weights", asked)
    made = _folders(run, folder)
    if "conversion" in kinds:
        run.commands(
            shape, "conversion", commands.conversions(run.peers, folder / META, folder / HUGGING_FACE)
        )
    for task in TASKS:
        if task in kinds:
            for group in _groups(task, run, made):
                run.contest(shape, task, group, folder / ROWS)
    shutil.rmtree(folder)


def _folders(run: contest.Run, folder: Path) -> dict[str, Path]:
    """The model folders that the tools start from, by (tool, type)."""
    made = {"torch": folder / HUGGING_FACE, "mlx-lm float16": folder / HUGGING_FACE}
    for kind in (run.base, "4bit"):
        ours, theirs = folder / f"mlxlora-{kind}", folder / f"mlx-lm-{kind}"
        quantize = ["-q"] if kind == "4bit" else []
        commands.check(commands.convert(folder / META, ours, run.base, quantize))
        asked = {
            "task": "prepare",
            "folder": str(folder / HUGGING_FACE),
            "target": str(theirs),
            "dtype": run.base,
            "bits": 4 if kind == "4bit" else 0,
        }
        run.worker_once(run.peers, "workers.with_mlx_lm", asked)
        made |= {f"mlxlora {kind}": ours, f"mlx-lm {kind}": theirs}
    return made


def _groups(task: str, run: contest.Run, folders: dict[str, Path]) -> list[Group]:
    """Who takes part; those of a group must agree on the loss."""
    base, quick = run.base, run.pace == QUICK

    def ours(kind: str, adapter: bool = False) -> Entry:
        return Entry("mlxlora", "with_mlxlora", folders[f"mlxlora {kind}"], kind, kind, adapter=adapter)

    def theirs(kind: str, fast: bool, adapter: bool = False) -> Entry:
        name = "mlx-lm, same BLAS" if fast else "mlx-lm"
        return Entry(
            name, "with_mlx_lm", folders[f"mlx-lm {kind}"], kind, kind, adapter=adapter, fast_blas=fast
        )

    def torch(dtype: str, adapter: bool = False) -> Entry:
        return Entry("torch + peft", "with_torch", folders["torch"], dtype, dtype, adapter=adapter)

    # As installed it takes minutes a step on a CPU.
    stock = [] if quick and run.on_cpu else [False]
    blas = [*([True] if run.on_cpu else []), *stock]
    dense = [ours(base), *(theirs(base, fast) for fast in blas), torch(base)]
    dense += [] if base == "bfloat16" else [torch("bfloat16")]
    packed = [ours("4bit"), *(theirs("4bit", fast) for fast in blas)]
    if task == "decode":
        adapted = [ours(base, True), theirs(base, blas[0], True), torch(base, True)]
        half = [theirs("float16", False)] if run.on_cpu and stock else []
        return [Group("", [*dense, *half, *adapted]), Group("4bit", packed)]
    if task == "train":
        return [Group("", [*dense, *_by_tiles(folders[f"mlxlora {base}"])]), Group("4bit", packed)]
    return [Group("", dense)]


def _by_tiles(folder: Path) -> list[Entry]:
    """mlxlora with products of bfloat16, where this processor has tiles for them."""
    try:
        tiles = sgemm.open_library().mlxlora_has_tiles()
    except ResourceError:
        return []
    return [
        Entry(f"mlxlora, compute {compute}", "with_mlxlora", folder, "float32", compute)
        for compute in (PRECISIONS[1:] if tiles else ())
    ]


def _start_up(run: contest.Run, folder: Path) -> None:
    """Start-up of the command lines, on the embedded model."""
    (shape,) = [shape for shape in SHAPES if shape.name == "embedded"]
    home = folder / "start-up"
    home.mkdir()
    asked = {"shape": shape.name, "folder": str(home), "checkpoint": str(DEMO)}
    run.worker_once(run.peers, "workers.weights", asked)
    commands.check(commands.convert(home / META, home / "model", "float16", []))
    run.commands(shape, "start-up", commands.starts(run.peers, home / "model", home / HUGGING_FACE))


def _keep(result: dict[str, Any]) -> None:
    """Write the results, and put the table with its date into docs/performance.md."""
    name = "-".join(result["machine"]["device"]["name"].lower().split()) or platform.machine()
    target = HERE / "results" / f"peers-{name}-{result['machine']['threads']}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    PAGE.write_text(table.replaced(PAGE.read_text("utf-8"), table.markdown(result)), "utf-8")
    click.echo(f"kept in {os.path.relpath(target)} and {os.path.relpath(PAGE)}", err=True)


if __name__ == "__main__":
    main()
