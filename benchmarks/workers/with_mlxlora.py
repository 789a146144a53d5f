"""mlxlora, through the functions that its verbs call."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.cli.session import start
from mlxlora_core.machine.device import PRECISIONS, on_cpu, product_precision
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.drawing import Drawing
from mlxlora_core.model.generate import decode
from mlxlora_core.plugins import Registry, load
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.events import Note, TrainReport, ValidReport
from mlxlora_core.training.examples import Example, Examples
from mlxlora_core.training.loop import Training
from mlxlora_core.training.session import NewAdapter, open_training
from mlxlora_core.training.settings import TrainConfig
from workers.channel import Channel, Job, job, version
from workers.products import product_samples
from workers.shapes import RANK

_LAST: list[float | None] = [None]  # losses of validations
MORE_STEPS = 1_000_000  # than anybody asks for


def main() -> None:
    """Do the job."""
    channel, work = Channel(), job()
    registry = load(environ={"MLXLORA_PLUGINS": ""})
    notes = start(registry)
    facts = {"versions": version("mlxlora", "mlx"), "runtime": notes, "device": str(mx.default_device())}
    told: dict[str, Any] = {}
    if work.task == "matmul":
        samples, loss = _products(work), None
    else:
        model = loading.load(Path(work.folder), registry)
        if work.adapter or work.task == "train":
            _attach(model, registry)
        rows = [_example(row) for row in work.read_rows()]
        check = _example(work.read_rows()[0][: work.check_tokens])
        with product_precision(_compute(work)):
            loss = evaluate(model.language_model, [check], 1, -1).mean
        if work.task == "train":
            training = _training(work, model, rows)
            samples, told["compiles"] = _steps(training), lambda: training.compiles
        elif work.task == "epochs":
            samples, told["loss"] = _epochs(work, model, rows, registry), lambda: _LAST[-1]
        else:
            samples = _generate(work, model, registry)
    channel.say(loss=loss, **facts)
    channel.serve(samples, device_bytes=mx.get_peak_memory, **told)


def _compute(work: Job) -> str:
    """What large products are made of: asked for on a CPU alone, whose base is float32."""
    return work.dtype if on_cpu() and work.dtype in PRECISIONS else PRECISIONS[0]


def _products(work: Job) -> Iterator[float]:
    dtype = getattr(mx, work.dtype)
    a, b = (mx.random.normal((work.side, work.side)).astype(dtype) for _ in range(2))
    return product_samples(lambda: mx.eval(a @ b.T))


def _attach(model: Any, registry: Registry) -> None:
    lora = registry.find("adapter", "lora")
    values = {"rank": RANK, "targets": ["wq", "wv"], "layers": -1}
    adapters.attach(model, *configure(lora, values), seed=0)


def _example(row: list[int]) -> Example:
    return Example(np.array(row, np.uint32), np.arange(len(row)) > 0)


def _training(work: Job, model: Any, rows: list[Example]) -> Training:
    config = TrainConfig(
        iters=MORE_STEPS,
        batch_size=work.batch,
        steps_per_report=1,
        learning_rate=1e-5,
        compute=_compute(work),
    )
    return Training(model.language_model, rows, (), config, seed=0)


def _steps(training: Training) -> Iterator[float]:
    steps = iter(training)
    while True:
        began = time.perf_counter()
        next(steps)
        yield time.perf_counter() - began


def _epochs(work: Job, model: Any, rows: list[Example], registry: Registry) -> Iterator[float]:
    """Seconds of each epoch, the first with all that comes before it; then of what comes after the last."""
    steps = -(-len(rows) // work.batch)
    config = TrainConfig(
        iters=work.epochs * steps,
        batch_size=work.batch,
        learning_rate=work.learning_rate,
        steps_per_report=1,
        steps_per_eval=MORE_STEPS,
        val_batches=-1,
        reuse_prefix=work.reuse,
    )
    lora = registry.find("adapter", "lora")
    adapter = NewAdapter(
        *configure(lora, {"rank": RANK, "scale": 2.0, "targets": ["wq", "wv"], "layers": work.layers})
    )
    valid = tuple(_example(row) for row in work.read_valid())
    splits = {"train": Examples(tuple(rows)), "valid": Examples(valid)}
    began = time.perf_counter()
    session = open_training(model, adapter, splits, config, registry)
    for event in session.start():
        if isinstance(event, Note):
            sys.stderr.write(f"{event}\n")
        if isinstance(event, ValidReport):
            _LAST.append(event.loss)
        if isinstance(event, TrainReport) and event.step % steps == 0:
            yield time.perf_counter() - began
            began = time.perf_counter()
    yield time.perf_counter() - began


def _generate(work: Job, model: Any, registry: Registry) -> Iterator[float]:
    """Of decode the time after the first token, of prefill the time up to it."""
    greedy = registry.find("sampler", "greedy")
    draw = Drawing([(greedy, greedy.spec.options())], seed=0)
    count = 1 + (work.new_tokens if work.task == "decode" else 0)
    while True:
        began = time.perf_counter()
        tokens = decode(model.language_model, work.prompt, draw.soon, num_tokens=count, stops=())
        next(tokens)
        first = time.perf_counter()
        made = sum(1 for _ in tokens)
        assert made == count - 1
        yield time.perf_counter() - first if made else first - began


if __name__ == "__main__":
    main()
