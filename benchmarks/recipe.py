"""The training of a recipe, beside PyTorch with PEFT in float32 on the same rows in the same batches.

    python benchmarks/recipe.py --python PEERS/bin/python [--recipe smollm2] [--set adapter.layers=8]

Both take the same base, which mlxlora exports for transformers, the same low-rank adapter with the same
values at first, rows, epochs, learning rates and clipping, and validate at the end on the same rows; the
losses are to be the same. PyTorch pads each batch to its longest row. One trains after the other, and the
times are those of the whole training, from the model in memory on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from peers import check_environment
from workers.contest import BENCHMARKS
from workers.environment import own_kernels

import mlxlora_core
from mlxlora_core.machine.device import prepare_cpu
from mlxlora_core.machine.processors import thread_count
from mlxlora_core.model import loading
from mlxlora_core.model.adapters import trainable
from mlxlora_core.model.located import locate_model
from mlxlora_core.plugins import Registry, load, start_runtimes
from mlxlora_core.runs import recipe_source
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.training.batches import steps_from
from mlxlora_core.training.dataset import build_dataset
from mlxlora_core.training.events import Note, ValidReport
from mlxlora_core.training.examples import Examples, examples_of
from mlxlora_core.training.optimizer import learning_rate
from mlxlora_core.training.session import NewAdapter, open_training
from mlxlora_core.training.sources import read_data

FIRST = "first.npz"  # what the adapter begins with
SAME = 0.005  # how far losses of validation may be apart


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--python", "peers", default=sys.executable, help="Python of the peers' environment.")
@click.option("--recipe", "name", default="smollm2", show_default=True, help="Recipe with a LoRA adapter.")
@click.option("--set", "sets", multiple=True, default=["adapter.layers=8"], show_default=True)
@click.option("--without-peer", is_flag=True, help="Only mlxlora.")
def main(peers: str, name: str, sets: Sequence[str], without_peer: bool) -> None:
    """Measure and print."""
    own_kernels()
    if not without_peer:
        check_environment(peers)
    prepare_cpu()
    registry = load()
    start_runtimes(registry)
    recipe = recipe_source.read(recipe_source.find_recipe(name, registry), sets, registry)
    with tempfile.TemporaryDirectory(prefix="mlxlora-recipe-") as folder:
        rows, ours = _ours(recipe, registry, Path(folder))
        click.echo(_line("mlxlora", ours))
        if without_peer:
            return
        mlxlora_core.export(str(recipe.model.mlx_path), "hf", Path(folder, "hf"))
        theirs = _theirs(peers, recipe, rows, Path(folder))
    click.echo(_line("torch + peft", theirs))
    click.echo(f"mlxlora is {theirs['seconds'] / ours['seconds']:.2f} times as fast")
    apart = abs(ours["loss"] - theirs["loss"]) / theirs["loss"]
    click.echo(f"the losses are {apart:.2%} apart")
    if apart > SAME:
        click.echo(f"the losses differ by more than {SAME:.1%}", err=True)


def _line(tool: str, found: dict[str, Any]) -> str:
    return f"{tool:28} {found['seconds']:7.1f} s, validation loss {found['loss']:.4f}"


def _ours(recipe: Recipe, registry: Registry, folder: Path) -> tuple[dict[str, Examples], dict[str, Any]]:
    """The rows, and what mlxlora's training of them took and came to."""
    build_dataset(recipe.data, recipe.data_config, folder / "data")
    model = loading.load(locate_model(str(recipe.model.mlx_path)).path, registry)
    read = read_data(folder / "data", ("train", "valid"))
    rows = {split: examples_of(read[split], model, recipe.train) for split in ("train", "valid")}
    adapter = NewAdapter(recipe.adapter, recipe.adapter_config)
    began = time.perf_counter()
    session = open_training(model, adapter, rows, recipe.train, registry, seed=recipe.run.seed)
    opened = time.perf_counter()
    first = trainable(model.module)
    np.savez(folder / FIRST, **{name: np.array(x) for name, x in first.items() if name.endswith("lora_a")})
    began += time.perf_counter() - opened
    loss = float("nan")
    for event in session.start():
        if isinstance(event, Note):
            click.echo(str(event), err=True)
        if isinstance(event, ValidReport):
            loss = event.loss
    return rows, {"seconds": time.perf_counter() - began, "loss": loss}


def _theirs(peers: str, recipe: Recipe, rows: dict[str, Examples], folder: Path) -> dict[str, Any]:
    """What PyTorch's training took and came to, with the same rows in each step."""
    config, steps = recipe.train, range(1, recipe.train.iters + 1)
    order = steps_from(
        rows["train"].examples,
        config.rows_a_step,
        recipe.run.seed,
        by_length=config.group_by_length,
    )
    work = {
        "folder": str(folder / "hf"),
        "first": str(folder / FIRST),
        "threads": thread_count(),
        "rank": recipe.adapter.options.rank,
        "scale": recipe.adapter.options.scale,
        "layers": recipe.adapter_config.layers,
        "clip": config.grad_clip,
        "batch": config.batch_size,
        "validations": 1 + sum(step % config.steps_per_eval == 0 or step == config.iters for step in steps),
        "steps": list(islice(order, config.iters)),
        "rates": [learning_rate(config, step) for step in steps],
        **{
            split: [(e.tokens.tolist(), e.mask.tolist()) for e in found.examples]
            for split, found in rows.items()
        },
    }
    (folder / "work.json").write_text(json.dumps(work))
    command = [peers, "-m", "workers.recipe_with_torch", str(folder / "work.json")]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
