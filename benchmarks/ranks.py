"""Ranks with a core each beside one process on all of them: tokens a second, and what goes round in a step.

``python benchmarks/ranks.py [--ranks 2] [--rounds 3] [--iters 60] [--recipe demo] [--out FILE]`` trains
the adapter of a recipe in one process on so many cores, and then in so many ranks of which each has a
core of its own, turn by turn. The median of the rounds counts. Processor time is told too, for machines
that have other work: it cannot show that ranks wait for one another.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from workers.environment import own_kernels

from mlxlora_core.distributed.group import Group, join
from mlxlora_core.distributed.hosts import here
from mlxlora_core.machine.device import prepare_cpu
from mlxlora_core.machine.processors import THREADS
from mlxlora_core.plugins import load, start_runtimes
from mlxlora_core.runs import pipeline
from mlxlora_core.runs.base import base_of
from mlxlora_core.runs.events import StageDone
from mlxlora_core.runs.folder import DATA, MODEL
from mlxlora_core.runs.recipe_source import find_recipe, read
from mlxlora_core.training.events import Advanced

#: environment variable that tells a process of this script what to do
JOB = "MLXLORA_BENCHMARK_JOB"
MESSAGES = 50  # of a step's size that are sent by themselves


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--ranks", default=2, show_default=True, help="How many, and how many cores.")
@click.option("--rounds", default=3, show_default=True, help="Times that each way trains.")
@click.option(
    "--iters", default=60, show_default=True, help="Steps of a training; the first tenth is not timed."
)
@click.option("--recipe", "name", default="demo", show_default=True, help="Whose base, rows and adapter.")
@click.option("--set", "sets", multiple=True, help="As of mlxlora run.")
@click.option("--out", type=Path, help="Write the figures to this JSON file.")
def main(ranks: int, rounds: int, iters: int, name: str, sets: Sequence[str], out: Path | None) -> None:
    """Measure and print."""
    own_kernels()
    registry = load()
    with tempfile.TemporaryDirectory() as folder:
        given = [f"run.folder={folder}/run", f"train.iters={iters}", "train.steps_per_eval=100000", *sets]
        recipe = read(find_recipe(name, registry), given, registry)
        for event in pipeline.run(recipe, registry):
            if isinstance(event, StageDone) and event.stage == "data":
                break
        job = {"recipe": name, "sets": given, "iters": iters}
        found: dict[str, list[list[dict[str, Any]]]] = {"one process": [], "ranks": []}
        for _ in range(rounds):
            found["one process"].append(trained(job, 1, ranks))
            found["ranks"].append(trained(job, ranks, 1))
    figures = {way: summary(measured) for way, measured in found.items()}
    figures["ratio"] = figures["ranks"]["tokens_per_second"] / figures["one process"]["tokens_per_second"]
    click.echo(json.dumps(figures, indent=2))
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")


def summary(rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The medians over rounds; speeds are those of rank 0, and processor time is that of all."""
    first = [ranks[0] for ranks in rounds]
    cpu = [sum(rank["cpu_seconds"] for rank in ranks) / ranks[0]["tokens"] for ranks in rounds]
    return {
        "tokens_per_second": statistics.median(rank["tokens"] / rank["seconds"] for rank in first),
        "cpu_microseconds_a_token": 1e6 * statistics.median(cpu),
        "loss": first[0]["loss"],
        **{key: first[0][key] for key in ("messages_a_step", "bytes_a_step", "message_milliseconds")},
    }


def trained(job: dict[str, Any], ranks: int, cores: int) -> list[dict[str, Any]]:
    """What each of some processes finds, of which each has so many cores to itself."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps(here(ranks).ring()))
        processes = []
        for rank in range(ranks):
            own = {"cores": list(range(rank * cores, (rank + 1) * cores))}
            environment = {**os.environ, JOB: json.dumps(job | own), THREADS: str(cores)}
            environment |= {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} if ranks > 1 else {}
            command = [sys.executable, __file__]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
        told = [process.communicate()[0] for process in processes]
    return [json.loads(text) for text in told]


def work(job: dict[str, Any]) -> None:
    """Train as one of the processes, and print what was found."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job["cores"])
    prepare_cpu()
    group, registry = join(), load()
    runtimes = [note.text for note in start_runtimes(registry)]
    from mlxlora_core.model import loading
    from mlxlora_core.training.session import NewAdapter, open_training
    from mlxlora_core.training.sources import read_data

    recipe = read(find_recipe(job["recipe"], registry), job["sets"], registry)
    base, quantization = base_of(recipe, recipe.folder / MODEL)
    session = open_training(
        loading.load(base, registry, quantization),
        NewAdapter(recipe.adapter, recipe.adapter_config),
        read_data(recipe.folder / DATA, ("train",)),
        recipe.train,
        registry,
        seed=recipe.run.seed,
        runtimes=runtimes,
        group=group,
    )
    click.echo(json.dumps(timed(session, group, job["iters"])))


def timed(session: Any, group: Group, iters: int) -> dict[str, Any]:
    """What the steps of a training take, but for the first tenth, and what they send."""
    messages, training = counted(), session.training
    mark, tokens, losses = (0.0, 0.0), 0, []
    for event in session.start():
        if not isinstance(event, Advanced) or event.what != "training":
            continue
        if training.step == iters // 10:
            mark, tokens = (time.perf_counter(), time.process_time()), training.progress.trained_tokens
            messages.clear()
        losses = list(training.progress.recent)
        if training.step == iters:
            break
    seconds, cpu = time.perf_counter() - mark[0], time.process_time() - mark[1]
    steps = iters - iters // 10
    found = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": training.progress.trained_tokens - tokens,
        "loss": losses[-1],
        "messages_a_step": len(messages) / steps,
        "bytes_a_step": sum(messages) // steps,
    }
    return {**found, "message_milliseconds": 1e3 * statistics.median(alone(group, found["bytes_a_step"]))}


def counted() -> list[int]:
    """A list that gets the bytes of each message from here on."""
    sizes: list[int] = []
    for name in ("all_sum", "all_gather"):
        plain = getattr(mx.distributed, name)

        def send(x: mx.array, plain: Any = plain) -> mx.array:
            sizes.append(x.nbytes)
            sent: mx.array = plain(x)
            return sent

        setattr(mx.distributed, name, send)
    return sizes


def alone(group: Group, size: int) -> Iterator[float]:
    """The seconds that each of some messages of a size takes when nothing else is done."""
    numbers = mx.ones(max(size // 4, 1))
    for _ in range(MESSAGES):
        group.wait()
        began = time.perf_counter()
        mx.eval(group.sum([numbers]))
        yield time.perf_counter() - began


if __name__ == "__main__":
    if JOB in os.environ:
        work(json.loads(os.environ[JOB]))
    else:
        main()
