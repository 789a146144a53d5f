"""mlxlora on one GPU, beside mlx-lm on the same MLX and PyTorch with PEFT.

    python benchmarks/gpu.py --python PEERS/bin/python [--shape 1b] [--minutes 8] [--json]

It is ``benchmarks/peers.py`` (the same workers, which must agree on the loss
and then take turns) with what one GPU of 80 GB in a few minutes asks for:
weights of 1 B and 7 B parameters are drawn on the GPU, in bfloat16; the
results are written after each kind of work, so that a run that is cut off has
those so far; what fails, or would not end in time, is told and left out.
``--tiny`` runs everything on a small model in a minute or two, on a CPU as well.

Models are written to the folder for temporary files: 10 GB for 1 B, 50 GB for 7 B.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
from peers import HERE, PAGE, check_environment
from workers import commands, contest, table
from workers.contest import TASKS, Entry, Group, Pace
from workers.environment import own_kernels
from workers.shapes import SHAPES, Shape
from workers.weights import HUGGING_FACE, META, ROWS

from mlxlora_core.errors import one_line
from mlxlora_core.machine import doctor

#: 80 GB hold three tools at once with what training keeps for the gradient: 4 rows of 512 tokens and 1
PACES = {
    "1b": Pace(25, 4.0, batch=4, prompt_tokens=1024, new_tokens=64, patience_seconds=200.0),
    "7b": Pace(15, 5.0, batch=1, prompt_tokens=1024, new_tokens=64, patience_seconds=200.0),
    "embedded": Pace(2, 10.0, batch=1, prompt_tokens=64, new_tokens=8),
}
TINY = "embedded"


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--python", "peers", default=sys.executable, help="Python of the peers' environment.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice([s for s in PACES if s != TINY]))
@click.option("--tiny", is_flag=True, help="A small model instead, to see whether everything runs.")
@click.option("--minutes", type=float, default=8.0, show_default=True, help="Begin nothing that ends later.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--result", "target", type=Path, help="Write the result here.  [default: benchmarks/results/]")
@click.option("--page", type=Path, help="Measure nothing; put a kept result into docs/performance.md.")
def main(
    peers: str,
    shapes: Sequence[str],
    tiny: bool,
    minutes: float,
    as_json: bool,
    target: Path | None,
    page: Path | None,
) -> None:
    """Measure, print, and keep the results."""
    own_kernels()
    if page is not None:
        made = table.markdown(json.loads(page.read_text("utf-8")))
        PAGE.write_text(table.replaced(PAGE.read_text("utf-8"), made, table.GPU), "utf-8")
        return
    check_environment(peers)
    device = doctor.device()
    if device.kind == "cpu" and not tiny:
        raise click.UsageError("MLX has no GPU here; --tiny runs a small model on the CPU")
    name = "-".join(device.name.lower().split()) or platform.machine()
    kept = Path(os.devnull) if tiny else HERE / "results" / f"gpu-{name}.json"
    target = target or kept
    names = [TINY] if tiny else shapes or [s for s in PACES if s != TINY]
    record = Record(device, names, 60 * minutes, target)
    result = record.result
    run = contest.Run(peers, PACES[names[0]], device.kind == "cpu", result)
    with tempfile.TemporaryDirectory(prefix="mlxlora-gpu-") as folder:
        _measure_all(run, record, [shape for shape in SHAPES if shape.name in names], Path(folder))
    click.echo(json.dumps(result, indent=2) if as_json else table.text(result))
    for fault in result["faults"]:
        click.echo(f"left out: {fault}", err=True)
    click.echo(f"kept in {os.path.relpath(target)}", err=True)


class Record:
    """What is known so far, in a file as well, and the time that is left.

    Attributes:
        result: of the benchmark.
    """

    def __init__(self, device: doctor.Device, names: Sequence[str], seconds: float, target: Path) -> None:
        self.result: dict[str, Any] = {
            "date": datetime.now(UTC).date().isoformat(),
            "quick": TINY in names,
            "machine": {
                "system": platform.platform(),
                "device": asdict(device),
                "threads": doctor.threads().count,
                "memory_bytes": doctor.memory().total_bytes,
            },
            **{name: {} for name in ("versions", "rates", "seconds")},
            **{name: [] for name in ("checks", "rows", "faults", "first_samples")},
        }
        self._target, self._end, self._longest = target, time.monotonic() + seconds, 0.0

    def attempt(self, what: str, work: Callable[[], None], timed: bool = False) -> bool:
        """Do some work, note how long it took or what was wrong, and write the file.

        Args:
            what: it is.
            work: to do.
            timed: whether it is left out where one as long as the longest so far would not end in time.

        Returns:
            Whether it was done.
        """
        began = time.monotonic()
        if began + (self._longest if timed else 0.0) > self._end:
            self.result["faults"].append(f"{what}: no time left")
            return False
        faults = len(self.result["faults"])
        try:
            work()
        except (click.ClickException, contest.Failed, OSError) as fault:
            said = fault.message if isinstance(fault, click.ClickException) else str(fault)
            self.result["faults"].append(f"{what}: {one_line(said)}")
            click.echo(f"{what} failed: {said}", err=True)
        took = self.result["seconds"][what] = round(time.monotonic() - began, 1)
        self._longest = max(self._longest, took if timed else 0.0)
        table.compare(self.result["rows"])
        self._target.write_text(json.dumps(self.result, indent=2) + "\n")
        return len(self.result["faults"]) == faults


def _measure_all(run: contest.Run, record: Record, shapes: Sequence[Shape], parent: Path) -> None:
    """First all that is not timed, the models of later shapes while the kernels for the first are built."""
    run.pace = replace(PACES[shapes[0].name], samples=3)
    if not record.attempt("matrix products", lambda: record.result["rates"].update(run.rates())):
        return
    run.pace = PACES[shapes[0].name]
    with ThreadPoolExecutor(1) as aside:
        made = [_models(run, record, shapes[0], parent, 3)]
        later = [aside.submit(_models, run, record, shape, parent, 1) for shape in shapes[1:]]
        if made[0] and not run.on_cpu:
            record.attempt("first samples", lambda: _warm_up(run, record, parent / shapes[0].name))
        made += [future.result() for future in later]
    for shape, sound in zip(shapes, made, strict=True):
        if sound:
            run.pace = PACES[shape.name]
            _contests(run, record, shape, parent / shape.name)
            shutil.rmtree(parent / shape.name)


def _contests(run: contest.Run, record: Record, shape: Shape, folder: Path) -> None:
    """All that is timed of one shape."""
    for task in TASKS:
        for group in _groups(run, folder):
            what = f"{shape.name}: {task} {group.name or run.base}"
            record.attempt(what, partial(run.contest, shape, task, group, folder / ROWS), timed=True)


def _warm_up(run: contest.Run, record: Record, folder: Path) -> None:
    """Let MLX build its kernels, with all work at the same time."""
    tools = [entry for group in _groups(run, folder) for entry in group.entries if "mlx" in entry.tool]
    record.result["first_samples"] += run.warm_up([(task, tools) for task in TASKS], folder / ROWS)


def _models(run: contest.Run, record: Record, shape: Shape, parent: Path, at_once: int) -> bool:
    """The folders that the tools start from; whether they were made."""
    work = partial(_write_models, run, shape, parent / shape.name, at_once)
    return record.attempt(f"{shape.name}: models", work)


def _write_models(run: contest.Run, shape: Shape, folder: Path, at_once: int) -> None:
    """All from one set of random weights, so many conversions at once."""
    folder.mkdir()
    asked = {"shape": shape.name, "folder": str(folder), "dtype": run.base}
    run.worker_once(run.peers, "workers.weights", asked)
    theirs = {"task": "prepare", "folder": str(folder / HUGGING_FACE), "target": str(folder / "mlx-lm-4bit")}
    theirs |= {"dtype": run.base}

    def ours(name: str, *flags: str) -> None:
        commands.check(commands.convert(folder / META, folder / name, run.base, flags))

    with ThreadPoolExecutor(at_once) as pool:
        made = [
            pool.submit(ours, "mlxlora"),
            pool.submit(ours, "mlxlora-4bit", "-q"),
            pool.submit(run.worker_once, run.peers, "workers.with_mlx_lm", {**theirs, "bits": 4}),
        ]
    for future in made:
        future.result()
    shutil.rmtree(folder / META)


def _groups(run: contest.Run, folder: Path) -> list[Group]:
    """Who takes part; the dense weights of mlx-lm and PyTorch are the Hugging Face folder itself."""
    base = run.base
    name = "mlx-lm, same BLAS" if run.on_cpu else "mlx-lm"

    def theirs(model: str, kind: str) -> Entry:
        return Entry(name, "with_mlx_lm", folder / model, kind, kind, fast_blas=run.on_cpu)

    dense = [
        Entry("mlxlora", "with_mlxlora", folder / "mlxlora", base, base),
        theirs(HUGGING_FACE, base),
        Entry("torch + peft", "with_torch", folder / HUGGING_FACE, base, base),
    ]
    packed = [
        Entry("mlxlora", "with_mlxlora", folder / "mlxlora-4bit", "4bit", "4bit"),
        theirs("mlx-lm-4bit", "4bit"),
    ]
    return [Group("", dense), Group("4bit", packed)]


if __name__ == "__main__":
    main()
