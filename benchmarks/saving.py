"""What saving costs: seconds in checkpoints over seconds of a training, in the demo at the default interval.

``python benchmarks/saving.py [--iters N] [--out FILE]`` runs the demo's training in a folder of
its own and adds up how long each checkpoint took. Validations do not count as training.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
from workers.environment import own_kernels

from mlxlora_core.cli.session import start
from mlxlora_core.plugins import load
from mlxlora_core.runs import pipeline
from mlxlora_core.runs.events import StageDone
from mlxlora_core.runs.recipe_source import read
from mlxlora_core.training.events import CheckpointSaved, TrainReport


@click.command()
@click.option("--iters", type=int, help="Steps instead of those of the demo.")
@click.option("--out", type=Path, help="Write the figures to this JSON file.")
def main(iters: int | None, out: Path | None) -> None:
    """Measure what saving costs in the demo."""
    own_kernels()
    registry = load()
    start(registry)
    with tempfile.TemporaryDirectory() as folder:
        sets = [f"run.folder={folder}/run", *([f"train.iters={iters}"] if iters else [])]
        recipe = read(registry.find("recipe", "demo").spec.path, sets, registry)
        saves: list[float] = []
        training, steps, began = 0.0, 0, time.perf_counter()
        for event in pipeline.run(recipe, registry):
            if isinstance(event, CheckpointSaved):
                saves.append(event.seconds)
            elif isinstance(event, TrainReport):
                training += (event.step - steps) / event.steps_per_second
                steps = event.step
            elif isinstance(event, StageDone) and event.stage == "train":
                break
        checkpoint = next(Path(folder).glob("run/checkpoints/step-*"))
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
    figures = {
        "steps": steps,
        "training_seconds": round(training, 2),
        "checkpoints": len(saves),
        "checkpoint_bytes": size,
        "saving_seconds": round(sum(saves), 3),
        "longest_save_seconds": round(max(saves), 3),
        "share_percent": round(100 * sum(saves) / training, 2),
        "wall_seconds": round(time.perf_counter() - began, 1),
    }
    click.echo(json.dumps(figures, indent=2))
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
