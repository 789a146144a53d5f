"""Tokens a second of a batch whose rows have four adapters, beside one adapter for all of them.

Both are measured in turns in one process, each over and over, and the median ratio counts::

    python benchmarks/several_adapters.py --model model-folder
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
from workers.environment import own_kernels

from mlxlora_core.machine.device import prepare_cpu
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.located import locate_model
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.plugins import Registry, load, start_runtimes
from mlxlora_core.plugins.sections import configure

NAMES = ("a", "b", "c", "d")


@click.command()
@click.option("--model", required=True, help="Model of any kind.")
@click.option("--batch", default=8, show_default=True, help="Rows, a multiple of 4.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of a prompt.")
@click.option("--rank", default=16, show_default=True)
@click.option("--times", default=7, show_default=True, help="Pairs to measure.")
def main(model: str, batch: int, tokens: int, rank: int, times: int) -> None:
    """Measure prompts and single tokens."""
    own_kernels()
    prepare_cpu()
    registry = load()
    start_runtimes(registry)
    path = locate_model(model).path
    with tempfile.TemporaryDirectory() as folder:
        files = [_adapter(path, Path(folder, f"{name}.safetensors"), rank, registry) for name in NAMES]
        base = loading.load(path, registry)
        several = AdapterSet(base)
        for name, file in zip(NAMES, files, strict=True):
            several.load(name, AdapterFile(file), registry)
    rows = [NAMES[row % len(NAMES)] for row in range(batch)]
    prompt = mx.random.randint(0, base.language_model.vocab_size, (batch, tokens), key=mx.random.key(0))

    def prefill() -> None:
        mx.eval(base.language_model.run(base.language_model.embed(prompt)))

    def decode() -> None:
        cache = base.language_model.make_cache()
        for place in range(8):
            hidden = base.language_model.run(
                base.language_model.embed(prompt[:, place : place + 1]), cache=cache
            )
            mx.eval(base.language_model.head(hidden[:, -1]))

    for what, work in (("prompts", prefill), ("single tokens", decode)):
        ratio, one, four = _ratio(several, rows, work, times)
        click.echo(f"{what}: one adapter {one:.3f} s, four in a batch {four:.3f} s, speed ratio {ratio:.3f}")


def _adapter(path: Path, file: Path, rank: int, registry: Registry) -> Path:
    """An adapter file on all linears of all layers."""
    base = loading.load(path, registry)
    choice, config = configure(
        registry.find("adapter", "lora"), {"rank": rank, "layers": -1, "targets": ["all-linear"]}
    )
    adapters.save(file, base, adapters.attach(base, choice, config, 0))
    return file


def _ratio(
    several: AdapterSet, rows: list[str], work: Callable[[], None], times: int
) -> tuple[float, float, float]:
    """How fast four adapters are against one, and the medians of both in seconds."""
    one, four = [], []
    for turn in range(times + 1):
        for selected, taken in (("a", one), (rows, four)):
            several.select(selected)
            started = time.perf_counter()
            work()
            if turn:  # the first is to warm up
                taken.append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(one, four, strict=True)]
    return statistics.median(ratios), statistics.median(one), statistics.median(four)


if __name__ == "__main__":
    main()
