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
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from peers import HERE, PAGE, check_environment
from workers import commands, contest, table
from workers.contest import TASKS, Entry, Group, Pace
from workers.shapes import SHAPES, Shape
from workers.weights import HUGGING_FACE, META, ROWS

from mlxlora_core import machine
from mlxlora_core.errors import one_line

#: 80 GB hold three tools at once with what training keeps for the gradient: 4 and 2 rows of 512 tokens
PACES = {
    "1b": Pace(7, 15.0, batch=4, prompt_tokens=1024, new_tokens=64, patience_seconds=90.0),
    "7b": Pace(5, 20.0, batch=2, prompt_tokens=1024, new_tokens=64, patience_seconds=120.0),
    "embedded": Pace(2, 10.0, batch=1, prompt_tokens=64, new_tokens=8),
}
TINY = "embedded"


@dataclass
class Clock:
    """How much of the time is left, and whether more of the same still fits in.

    Attributes:
        seconds: that the run may take.
        longest: that any kind of work took so far.
    """

    seconds: float
    began: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def fits(self) -> bool:
        """Whether another one would end in time."""
        return time.monotonic() - self.began + self.longest <= self.seconds

    def timed(self, work: Callable[[], None]) -> float:
        """Do some work; the seconds that it took."""
        began = time.monotonic()
        try:
            work()
        finally:
            took = time.monotonic() - began
            self.longest = max(self.longest, took)
        return took


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
    if page is not None:
        made = table.markdown(json.loads(page.read_text("utf-8")))
        PAGE.write_text(table.replaced(PAGE.read_text("utf-8"), made, table.GPU), "utf-8")
        return
    check_environment(peers)
    device = machine.device()
    if device.kind == "cpu" and not tiny:
        raise click.UsageError("MLX has no GPU here; --tiny runs a small model on the CPU")
    name = "-".join(device.name.lower().split()) or platform.machine()
    target = target or HERE / "results" / f"gpu-{name}.json"
    names = [TINY] if tiny else shapes or [s for s in PACES if s != TINY]
    result = _measure_all(peers, device, names, Clock(60 * minutes), target)
    click.echo(json.dumps(result, indent=2) if as_json else table.text(result))
    for fault in result["faults"]:
        click.echo(f"left out: {fault}", err=True)
    click.echo(f"kept in {os.path.relpath(target)}", err=True)


def _measure_all(
    peers: str, device: machine.Device, names: Sequence[str], clock: Clock, target: Path
) -> dict[str, Any]:
    """The result, which ``target`` holds too after each kind of work."""
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "quick": names == [TINY],
        "machine": {
            "system": platform.platform(),
            "device": asdict(device),
            "threads": machine.threads().count,
            "memory_bytes": machine.memory().total_bytes,
        },
        "versions": {},
        "rates": {},
        "checks": [],
        "rows": [],
        "faults": [],
        "seconds": {},
    }
    run = contest.Run(peers, PACES[names[0]], device.kind == "cpu", result)

    def attempt(what: str, work: Callable[[], None]) -> bool:
        """Do one thing, and keep what there is then; whether it went well."""
        if not clock.fits():
            result["faults"].append(f"{what}: no time left")
            return False
        sound = True
        try:
            result["seconds"][what] = clock.timed(work)
        except (click.ClickException, contest.Failed, OSError) as fault:
            said = fault.message if isinstance(fault, click.ClickException) else str(fault)
            result["faults"].append(f"{what}: {one_line(said)}")
            click.echo(f"{what} failed: {said}", err=True)
            sound = False
        table.compare(result["rows"])
        target.write_text(json.dumps(result, indent=2) + "\n")
        return sound

    if not attempt("matrix products", lambda: result["rates"].update(run.rates())):
        return result
    with tempfile.TemporaryDirectory(prefix="mlxlora-gpu-") as parent:
        for shape in (shape for shape in SHAPES if shape.name in names):
            run.pace = PACES[shape.name]
            folder = Path(parent) / shape.name
            if attempt(f"{shape.name}: models", lambda s=shape, f=folder: _write_models(run, s, f)):
                for task in TASKS:
                    for group in _groups(run, task, folder):
                        what = f"{shape.name}: {task} {group.name or run.base}"
                        attempt(
                            what, lambda s=shape, t=task, g=group, f=folder: run.contest(s, t, g, f / ROWS)
                        )
            shutil.rmtree(folder, ignore_errors=True)
    return result


def _write_models(run: contest.Run, shape: Shape, folder: Path) -> None:
    """The folders that the tools start from, made from one set of random weights."""
    folder.mkdir()
    asked = {"shape": shape.name, "folder": str(folder), "dtype": run.base}
    run.worker_once(run.peers, "workers.weights", asked)
    theirs = {"task": "prepare", "folder": str(folder / HUGGING_FACE), "target": str(folder / "mlx-lm-4bit")}
    theirs |= {"dtype": run.base}

    def ours(name: str, *flags: str) -> None:
        commands.check(commands.convert(folder / META, folder / name, run.base, flags))

    with ThreadPoolExecutor() as pool:
        made = [
            pool.submit(ours, "mlxlora"),
            pool.submit(ours, "mlxlora-4bit", "-q"),
            pool.submit(run.worker_once, run.peers, "workers.with_mlx_lm", {**theirs, "bits": 4}),
        ]
    for future in made:
        future.result()
    shutil.rmtree(folder / META)


def _groups(run: contest.Run, task: str, folder: Path) -> list[Group]:
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
