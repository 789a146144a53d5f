"""How fast MLX multiplies float32 matrices here, with and without the openblas runtime.

    python benchmarks/matmul.py [--shape 1024x1024x1024] [--rounds 3] [--json]

Stock and patched child processes take turns, so that what else the machine
does falls on both; each figure is the median over the rounds of the median in
a child. A product of (M, K) and (K, N) is 2 M K N floating-point operations.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import mlx.core as mx
from workers.environment import own_kernels

WAYS = ("stock", "openblas")
CHILD_SECONDS = 1.0


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    default=["1024x1024x1024"],
    show_default=True,
    help="MxKxN; may be repeated",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="children of each kind")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.option("--child", type=click.Choice(WAYS), hidden=True)
def main(shapes: tuple[str, ...], rounds: int, as_json: bool, child: str | None) -> None:
    """Run the children and print the table, or be one of them."""
    own_kernels()
    if child:
        click.echo(json.dumps(measure(child, shapes)))
        return
    result = compare(shapes, rounds)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(result["runtime"])
    for row in result["products"]:
        stock, fast = row["stock_gflops"], row["openblas_gflops"]
        click.echo(f"{row['product']:24} {stock:8.1f} -> {fast:8.1f} GFLOP/s  ({fast / stock:.1f} times)")


def compare(shapes: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Medians of children that take turns, a row a product."""
    told: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--child", way, *(f"--shape={shape}" for shape in shapes)]
            told[way].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    rows = [
        {"product": product}
        | {f"{way}_gflops": statistics.median(t["gflops"][product] for t in told[way]) for way in WAYS}
        for product in told["stock"][0]["gflops"]
    ]
    return {"runtime": told["openblas"][0]["runtime"], "rounds": rounds, "products": rows}


def measure(way: str, shapes: tuple[str, ...]) -> dict[str, Any]:
    """What one child finds: GFLOP/s of ``a @ b`` and ``a @ b.T`` for each shape."""
    from mlxlora_openblas.runtime import start

    note = start() if way == "openblas" else None
    rates = {}
    for shape in shapes:
        m, k, n = (int(side) for side in shape.split("x"))
        a, b, c = mx.random.normal((m, k)), mx.random.normal((k, n)), mx.random.normal((n, k))
        mx.eval(a, b, c)
        for name, right in (("a @ b", b), ("a @ b.T", c.T)):
            seconds = statistics.median(timings(partial(multiply, a, right)))
            rates[f"{name}  {shape}"] = 2e-9 * m * k * n / seconds
    return {"runtime": note.text if note else "", "gflops": rates}


def multiply(a: mx.array, b: mx.array) -> None:
    """``a @ b``, computed now."""
    mx.eval(a @ b)


def timings(call: Callable[[], object]) -> list[float]:
    """Seconds of each call, after a first one that is not counted, for about a second."""
    call()
    found: list[float] = []
    while sum(found) < CHILD_SECONDS or len(found) < 3:
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


if __name__ == "__main__":
    main()
