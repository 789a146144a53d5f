"""How long the one message of a training step takes on networks of any delay and rate, measured and reckoned.

``python benchmarks/network.py [--ranks 2,3,4] [--delays 0,1] [--rates 1] [--out FILE]``, as root on Linux,
joins a network namespace for each rank by cables of some delay and rate (``workers/cables.py``), and lets
MLX's ring add up the gradients of 0.3 million parameters there. Beside each time stands what the model
gives (``workers/message_time.py``), whose two numbers for the machine itself are fitted to all of them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from workers import cables
from workers.environment import own_kernels
from workers.message_time import Network, Overhead, message_seconds

HERE = Path(__file__).parent / "workers"
FIRST_PORT = 20000
#: of the switch itself, in seconds; it comes to what is added
LEAST_DELAY = 0.05e-3


def _floats(_context: click.Context, _parameter: click.Parameter, text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


@click.command()
@click.option("--ranks", default="2,3,4", callback=_floats, help="How many, each in a namespace of its own.")
@click.option("--delays", default="0,0.2,1,5,20", callback=_floats, help="Added one way, in milliseconds.")
@click.option("--rates", default="0.1,1,10", callback=_floats, help="Of a cable, each way, in Gbit/s.")
@click.option("--numbers", default=300_000, show_default=True, help="Float32 numbers of the message.")
@click.option("--repeats", default=3, show_default=True, help="Times each is measured; the median counts.")
@click.option("--out", type=Path, help="Write the figures to this JSON file.")
def main(
    ranks: list[float], delays: list[float], rates: list[float], numbers: int, repeats: int, out: Path | None
) -> None:
    """Measure messages, and hold them against the model."""
    own_kernels()
    finish(
        [point for count in ranks for point in measured(int(count), delays, rates, numbers, repeats)],
        numbers,
        out,
    )


def finish(points: list[dict[str, Any]], numbers: int, out: Path | None) -> None:
    """Hold what was measured against the model, and write both down."""
    overhead = fitted(points, numbers)
    click.echo(f"{1e6 * overhead.packet:.0f} µs a packet, {1e9 * overhead.byte:.2f} ns a byte")
    for point in points:
        point["reckoned_ms"] = {way: round(1e3 * reckoned(point, numbers, overhead, way), 2) for way in WAYS}
        told = ", ".join(f"{way} {point['measured_ms'][way]} ({off(point, way):+.1%})" for way in WAYS)
        click.echo(f"{point['ranks']} ranks, {point['delay_ms']:g} ms, {point['rate_gbit']:g} Gbit/s: {told}")
    figures = {
        "numbers": numbers,
        "overhead": vars(overhead),
        "least_delay": LEAST_DELAY,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "mlx": version("mlx"),
        "points": points,
    }
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")


WAYS = ("after_idle", "in_a_row")


def off(point: dict[str, Any], way: str) -> float:
    """By what share of the measured time the reckoned one is off."""
    share: float = point["reckoned_ms"][way] / point["measured_ms"][way] - 1
    return share


def reckoned(point: dict[str, Any], numbers: int, overhead: Overhead, way: str) -> float:
    """What the model gives for a point, in seconds."""
    rate = point["rate_gbit"] * 1e9
    network = Network("", point["delay_ms"] / 1e3 + LEAST_DELAY, rate, cables.headers(rate))
    return message_seconds(numbers, point["ranks"], network, overhead, way == "after_idle")


def fitted(points: Sequence[dict[str, Any]], numbers: int) -> Overhead:
    """The overhead with the least sum of squared relative errors, of a grid."""

    def error(overhead: Overhead) -> float:
        return sum(
            (1e3 * reckoned(point, numbers, overhead, way) / point["measured_ms"][way] - 1) ** 2
            for point in points
            for way in WAYS
        )

    grid = (
        Overhead(packet * 1e-6, byte * 1e-9)
        for packet in (0, 25, 50, 100, 150, 200, 300, 400)
        for byte in (0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3)
    )
    return min(grid, key=error)


def measured(
    ranks: int, delays: Sequence[float], rates: Sequence[float], numbers: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """The points of so many ranks."""
    with tempfile.TemporaryDirectory() as name, cables.joined(ranks) as switch:
        folder = Path(name)
        with started(ranks, numbers, repeats, folder) as workers:
            settings = [(delay, rate) for delay in delays for rate in rates]
            for number, (delay, rate) in enumerate(settings):
                switch.delay = delay / 1e3
                switch.set_rate(rate * 1e9)
                times = sums(workers, folder / f"{number}.json", FIRST_PORT + number * ranks)
                point = {"ranks": ranks, "delay_ms": delay, "rate_gbit": rate, "measured_ms": times}
                click.echo(json.dumps(point), err=True)
                yield point


@contextmanager
def started(ranks: int, numbers: int, repeats: int, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """A worker for each rank, in its namespace."""
    pause = folder / "pause.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", pause, HERE / "pause.c"], check=True)
    workers = []
    try:
        for rank in range(ranks):
            inside = ["ip", "netns", "exec", cables.namespace(rank), "env", f"LD_PRELOAD={pause}"]
            command = [
                *inside,
                sys.executable,
                str(HERE / "summing.py"),
                str(rank),
                str(numbers),
                str(repeats),
            ]
            workers.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        yield workers
    finally:
        for worker in workers:
            worker.communicate()


def sums(workers: Sequence[subprocess.Popen[str]], hosts: Path, port: int) -> dict[str, float]:
    """The median time of a sum in milliseconds: after some idle seconds, and in a row."""
    hosts.write_text(json.dumps([[f"{cables.address(rank)}:{port + rank}"] for rank in range(len(workers))]))
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{hosts}\n")
        worker.stdin.flush()
    told = [json.loads(worker.stdout.readline()) for worker in workers if worker.stdout is not None]
    found = {}
    for way in WAYS:
        each = sorted(
            max(end for _, end, _ in sample) - max(start for start, _, _ in sample)
            for sample in zip(*(rank[way] for rank in told), strict=True)
        )
        count = told[0][way][0][2]
        found[way] = round(1e3 * each[len(each) // 2] / count, 2)
    return found


if __name__ == "__main__":
    main()
