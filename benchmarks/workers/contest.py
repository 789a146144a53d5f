"""Contestants in processes of their own that take turns, and what they needed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlxlora_core.machine.processors import thread_count
from workers.channel import Job
from workers.commands import Command, run_command
from workers.process import Failed, Worker
from workers.shapes import Shape, decode_flop, prefill_flop, train_flop

BENCHMARKS = Path(__file__).parents[1]
ROOT = BENCHMARKS.parent

DECODE_PROMPT_TOKENS = 16

TASKS = ("train", "decode", "prefill")
_FLOP: dict[str, Callable[[Shape, int], int]] = {
    "train": train_flop,
    "decode": decode_flop,
    "prefill": prefill_flop,
}

#: by how much a loss may differ from the first contestant's, relative to it. Measured on the shapes
#: here: 1e-7 where both compute in float32, 2e-5 in float16, 6e-4 in bfloat16, which keeps 8 bits.
TOLERANCE = {"bfloat16": 5e-3}
EXACT = 1e-3


@dataclass(frozen=True)
class Pace:
    """How much to measure.

    Attributes:
        samples: of each contestant, at most.
        budget_seconds: after which a contestant that has one sample gives no more.
        batch: rows a training step.
        prompt_tokens: that prefill reads.
        new_tokens: that decode generates.
        patience_seconds: after which a contestant that says nothing is ended.
    """

    samples: int
    budget_seconds: float
    batch: int
    prompt_tokens: int
    new_tokens: int
    patience_seconds: float = 3600.0

    def tokens(self, task: str, shape: Shape) -> int:
        """Tokens that one sample works on."""
        work = {
            "train": self.batch * shape.row_tokens,
            "decode": self.new_tokens,
            "prefill": self.prompt_tokens,
        }
        return work[task]


@dataclass(frozen=True)
class Entry:
    """A tool, and how it takes part.

    Attributes:
        tool: its name.
        module: of the worker.
        folder: of its model.
        kind: type of the stored weights.
        dtype: what it is told to compute in.
        adapter: whether it decodes with an adapter on.
        fast_blas: whether mlx-lm gets mlxlora's BLAS.
    """

    tool: str
    module: str
    folder: Path
    kind: str
    dtype: str
    adapter: bool = False
    fast_blas: bool = False


@dataclass(frozen=True)
class Group:
    """Contestants that must agree on the loss; the others are held against the first."""

    name: str
    entries: Sequence[Entry]


class Run:
    """One run of the benchmark on one machine.

    Attributes:
        peers: Python of the peers' environment.
        pace: how long to measure.
        on_cpu: whether MLX computes on a CPU.
        base: type of the dense weights: float32 on a CPU, bfloat16 on a GPU.
        result: filled as the run goes.
    """

    def __init__(self, peers: str, pace: Pace, on_cpu: bool, result: dict[str, Any]) -> None:
        self.peers, self.pace, self.on_cpu, self.result = peers, pace, on_cpu, result
        self.base = "float32" if on_cpu else "bfloat16"
        self.threads = thread_count()

    def environment(self, tool: str) -> dict[str, str]:
        """Environment variables of a worker; mlx-lm with our BLAS needs our modules too."""
        paths = [BENCHMARKS, *([ROOT, ROOT / "plugins"] if tool == "mlx-lm, same BLAS" else [])]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "MLXLORA_THREADS": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def worker_once(self, python: str, module: str, asked: Mapping[str, Any]) -> None:
        """Run a module to its end."""
        command = [python, "-m", module, json.dumps(asked)]
        done = subprocess.run(command, env=self.environment(""), capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{module} failed: {done.stderr.strip()}")

    def rates(self) -> dict[str, float]:
        """GFLOP/s of matrix products by type, the best that any tool reaches here."""
        found: dict[str, float] = {}
        self.result["products"] = {}
        side = 1024 if self.on_cpu else 8192
        entries = [
            Entry("mlxlora", "with_mlxlora", Path(), self.base, self.base),
            Entry("torch + peft", "with_torch", Path(), self.base, self.base),
            *([Entry("torch + peft", "with_torch", Path(), "bfloat16", "bfloat16")] if self.on_cpu else []),
            *([Entry("mlx-lm", "with_mlx_lm", Path(), self.base, self.base)] if self.on_cpu else []),
        ]
        jobs = [Job("matmul", dtype=entry.dtype, threads=self.threads, side=side) for entry in entries]
        workers = self._start(entries, jobs)
        for entry, samples in zip(entries, self._take_turns(entries, workers), strict=True):
            rate = 2e-9 * side**3 / statistics.median(s["seconds"] for s in samples)
            self.result["products"][f"{entry.tool}, {entry.dtype}"] = rate
            found[entry.dtype] = max(rate, found.get(entry.dtype, 0.0))
            _say(f"matrix products  {entry.tool}, {entry.dtype}: {rate:.1f} GFLOP/s")
        return found

    def contest(self, shape: Shape, task: str, group: Group, rows: Path) -> None:
        """Check that a group agrees, then measure it; a row of results each."""
        workers = self._start(group.entries, self._jobs(task, group.entries, rows))
        try:
            self._check(shape, task, group, workers)
        except click.ClickException:
            for worker in workers:
                if isinstance(worker, Worker):
                    worker.close()
            raise
        tokens = self.pace.tokens(task, shape)
        flop = _FLOP[task](shape, tokens)
        measured = self._take_turns(group.entries, workers)
        for entry, worker, samples in zip(group.entries, workers, measured, strict=True):
            row = {
                "shape": shape.name,
                "kind": f"{task} {tokens}" + (f", {group.name}" if group.name else ""),
                "tool": entry.tool,
                "weights": entry.kind,
                "adapter": entry.adapter or task == "train",
                "unit": "tokens/s",
            }
            if isinstance(worker, Failed) or not samples:
                row["error"] = str(worker) if isinstance(worker, Failed) else "it ended early"
            else:
                row |= summary([tokens / s["seconds"] for s in samples])
                row |= {key: samples[-1][key] for key in ("peak_rss_bytes", "first_seconds")}
                row["device"] = worker.ready.get("device", "")
                row["device_bytes"] = max(s.get("device_bytes", 0) for s in samples)
                row["compiles"] = samples[-1].get("compiles", 0)
                against = "bfloat16" if entry.dtype == "bfloat16" else self.base
                row["mfu_of"] = against
                row["mfu"] = mfu(flop / tokens, row["median"], self.result["rates"][against])
            self._add(row)

    def warm_up(self, work: Sequence[tuple[str, Sequence[Entry]]], rows: Path) -> list[dict[str, Any]]:
        """One sample of every entry of every task, all at the same time, and how long each waited for it.

        On a GPU that is mostly MLX building kernels, minutes for some, which it then keeps on the disk.
        """
        entries = [(task, entry) for task, several in work for entry in several]
        jobs = [job for task, several in work for job in self._jobs(task, several, rows)]
        workers = self._start([entry for _, entry in entries], jobs)
        found = []
        for (task, entry), samples in zip(entries, self._first_samples(workers), strict=True):
            seconds = samples[0]["seconds"] if samples else None
            found.append({"kind": task, "tool": entry.tool, "weights": entry.kind, "seconds": seconds})
        for worker in workers:
            if isinstance(worker, Worker):
                worker.close()
        return found

    def _jobs(self, task: str, entries: Sequence[Entry], rows: Path) -> list[Job]:
        """What each entry is asked to do."""
        return [
            Job(
                task,
                folder=str(entry.folder),
                dtype=entry.dtype,
                adapter=entry.adapter,
                fast_blas=entry.fast_blas,
                rows=str(rows),
                batch=self.pace.batch,
                prompt_tokens=self.pace.prompt_tokens if task == "prefill" else DECODE_PROMPT_TOKENS,
                new_tokens=self.pace.new_tokens,
                threads=self.threads,
            )
            for entry in entries
        ]

    def _first_samples(self, workers: Sequence[Worker | Failed]) -> list[list[dict[str, Any]]]:
        """The first of two samples of each worker, all at the same time; none of one that went away.

        Two, for a compiled step is compiled again for the second, when the optimizer has a state.
        """
        asked = [worker for worker in workers if isinstance(worker, Worker)]
        for worker in asked * 2:
            worker.ask()
        found: list[list[dict[str, Any]]] = []
        for worker in workers:
            try:
                found.append([worker.read(), worker.read()][:1] if isinstance(worker, Worker) else [])
            except Failed as fault:
                _say(f"a worker went away: {fault}")
                found.append([])
        return found

    def commands(self, shape: Shape, kind: str, wanted: Sequence[Command]) -> None:
        """Measure commands that take turns; seconds and peak memory of each."""
        found: dict[str, list[tuple[float, int]]] = {command.name: [] for command in wanted}
        for _ in range(1 + self.pace.samples):
            for command in wanted:
                found[command.name].append(run_command(command, self.environment("")))
        for command in wanted:
            counted = found[command.name][1:]
            row: dict[str, Any] = {"shape": shape.name, "kind": f"{kind}: {command.group}"}
            row |= {"tool": command.tool, "unit": "seconds"} | summary([seconds for seconds, _ in counted])
            self._add({**row, "peak_rss_bytes": max(peak for _, peak in counted)})

    def _start(self, entries: Sequence[Entry], jobs: Sequence[Job]) -> list[Worker | Failed]:
        """Workers that have said that they are ready.

        On a CPU one after the other, so that they do not wait for each other's
        threads; on a GPU all at once, for most of it is imports and reading.
        """
        opened, started = [], []
        for entry, job in zip(entries, jobs, strict=True):
            python = sys.executable if entry.module == "with_mlxlora" else self.peers
            environment = self.environment(entry.tool)
            opened.append(Worker(python, entry.module, job, environment, self.pace.patience_seconds))
            if self.on_cpu:
                started.append(self._ready(opened[-1]))
        return started if self.on_cpu else [self._ready(worker) for worker in opened]

    def _ready(self, worker: Worker) -> Worker | Failed:
        """The worker once it is ready, or what it said last."""
        try:
            worker.ready = worker.read()
        except Failed as fault:
            worker.close()
            return fault
        self.result["versions"] |= worker.ready["versions"]
        return worker

    def _check(self, shape: Shape, task: str, group: Group, workers: Sequence[Worker | Failed]) -> None:
        """Refuse to time tools that compute something else.

        Raises:
            click.ClickException: a loss differs by more than its tolerance.
        """
        first = workers[0]
        if isinstance(first, Failed):
            raise click.ClickException(f"mlxlora failed: {first}")
        want = first.ready["loss"]
        for entry, worker in zip(group.entries, workers, strict=True):
            if isinstance(worker, Failed):
                continue
            computes_in = self.base if entry.dtype == "4bit" else entry.dtype
            loss, tolerance = worker.ready["loss"], TOLERANCE.get(computes_in, EXACT)
            off = abs(loss - want) / want
            self.result["checks"].append(
                {
                    "shape": shape.name,
                    "kind": task,
                    "tool": entry.tool,
                    "weights": entry.kind,
                    "loss": loss,
                    "off": off,
                    "tolerance": tolerance,
                }
            )
            if not off <= tolerance:
                raise click.ClickException(
                    f"{shape.name}, {task}: {entry.tool} ({entry.kind}) has a loss of {loss:.6f}, mlxlora "
                    f"{want:.6f}; they differ by {off:.1e}, allowed is {tolerance:g}"
                )

    def _take_turns(
        self, entries: Sequence[Entry], workers: Sequence[Worker | Failed]
    ) -> list[list[dict[str, Any]]]:
        """Samples of each worker, all with its peak memory at the end.

        The first is not counted, unless it took the worker's whole time: warming up is little of it
        then. On a GPU, where it can be all of it, the first ones are made at the same time and never count.
        """
        found: list[list[dict[str, Any]]] = [[] for _ in workers]
        if not self.on_cpu:
            found = self._first_samples(workers)
        spent = [0.0] * len(workers)
        gone = {i for i, worker in enumerate(workers) if isinstance(worker, Failed)}
        gone |= set() if self.on_cpu else {i for i, samples in enumerate(found) if not samples}
        for _ in range(self.pace.samples + self.on_cpu):
            for i, worker in enumerate(workers):
                enough = spent[i] > self.pace.budget_seconds
                if i in gone or enough or isinstance(worker, Failed):
                    continue
                began = time.perf_counter()
                try:
                    found[i].append(worker.sample())
                except Failed as fault:
                    gone.add(i)
                    _say(f"{entries[i].tool} went away: {fault}")
                spent[i] += time.perf_counter() - began
        for samples, worker in zip(found, workers, strict=True):
            if isinstance(worker, Worker):
                peak = worker.close()
                for sample in samples:
                    sample |= {"peak_rss_bytes": peak, "first_seconds": samples[0]["seconds"]}
        return [
            samples if len(samples) == 1 and self.on_cpu and i not in gone else samples[1:]
            for i, samples in enumerate(found)
        ]

    def _add(self, row: dict[str, Any]) -> None:
        """Keep a row, and show it as it comes."""
        self.result["rows"].append(row)
        value = row.get("error") or f"{row['median']:.4g} {row['unit']}"
        _say(f"{row['shape']}  {row['kind']}  {row['tool']} {row.get('weights', '')}: {value}")


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest of some samples, and how many there are."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "samples": len(values),
    }


def mfu(flop_per_token: float, tokens_per_second: float, gflops: float) -> float:
    """Model FLOP/s as a share of the rate of matrix products."""
    return flop_per_token * tokens_per_second / (gflops * 1e9)


def _say(line: str) -> None:
    click.echo(line, err=True)
