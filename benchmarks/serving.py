"""Tokens a second of many requests that share steps, beside those of one that is served alone.

Both are measured in turns in one process, each over and over, and the median ratio counts::

    python benchmarks/serving.py --model model-folder
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
from workers.environment import own_kernels

from mlxlora_core.machine.device import prepare_cpu
from mlxlora_core.model import loading
from mlxlora_core.model.located import locate_model
from mlxlora_core.plugins import load, start_runtimes
from mlxlora_core.serving.engine import Engine
from mlxlora_core.serving.request import Request
from mlxlora_core.serving.scheduler import Limits
from mlxlora_core.values import Tokenizer


class Endless:
    """A tokenizer without end tokens: how many tokens a text has is the same for all then."""

    stops: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@click.command()
@click.option("--model", required=True, help="Model of any kind.")
@click.option("--streams", default=16, show_default=True, help="Requests at once.")
@click.option("--prompt", default=8, show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", default=48, show_default=True, help="Tokens that are drawn for each.")
@click.option("--times", default=3, show_default=True, help="Pairs to measure.")
def main(model: str, streams: int, prompt: int, tokens: int, times: int) -> None:
    """Measure requests that come at the same time, prompts included."""
    own_kernels()
    prepare_cpu()
    registry = load()
    start_runtimes(registry)
    opened = loading.load(locate_model(model).path, registry)
    greedy = registry.find("sampler", "greedy")
    samplers = [(greedy, greedy.spec.options())]
    tokenizer = Endless(opened.tokenizer)
    started = time.perf_counter()
    with Engine(opened.language_model, tokenizer, limits=Limits(places=streams)) as engine:
        widths = engine.wait_until_ready()
        click.echo(f"ready after {time.perf_counter() - started:.2f} s, batches of {widths or 'one'} rows")

        def run(count: int, turn: int) -> tuple[float, float, float]:
            """Tokens a second of so many requests, tokens a second of processor time, and seconds to the
            first token of the last."""
            begun, spent = time.perf_counter(), time.process_time()
            asked = [
                Request(
                    [100 * turn + count + n, *range(50, 49 + prompt)], samplers=samplers, max_tokens=tokens
                )
                for n in range(count)
            ]
            open_ = [engine.submit(request) for request in asked]
            open_[-1].get()
            first, drawn = time.perf_counter() - begun, 0
            for number, stream in enumerate(open_):
                if number < count - 1 or tokens > 1:
                    for part in stream:
                        drawn = drawn + (part.usage.completion_tokens if part.usage else 0)
            seconds, busy = time.perf_counter() - begun, time.process_time() - spent
            return drawn / seconds, drawn / busy, first

        run(1, 1)  # to warm up
        found = [(run(1, turn), run(streams, turn)) for turn in range(2, times + 2)]
    ones, many = ([pair[side] for pair in found] for side in (0, 1))
    for name, results in (("1 request", ones), (f"{streams} requests", many)):
        speed, busy, first = (statistics.median(column) for column in zip(*results, strict=True))
        rates = f"{speed:.1f} tokens/s, {busy:.1f} a second of processor time"
        click.echo(f"{name}: {rates}, first token of the last after {first:.2f} s")
    ratios = [
        statistics.median(each[side] / one[side] for one, each in zip(ones, many, strict=True))
        for side in (0, 1)
    ]
    click.echo("ratio {:.2f}, by processor time {:.2f}".format(*ratios))


if __name__ == "__main__":
    main()
