"""How a worker talks with benchmarks/peers.py: a JSON line for each thing said.

The worker says that it is ready, then answers every line that it reads with
one measured sample, until there is nothing left to read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        task: ``matmul``, ``train``, ``epochs``, ``decode``, ``prefill`` or, of mlx-lm alone, ``prepare``.
        folder: of the model.
        dtype: to compute in, where the tool can be told.
        adapter: whether to decode with an adapter on.
        fast_blas: whether mlx-lm gets mlxlora's BLAS.
        rows: JSON file with token rows.
        batch: rows a step.
        prompt_tokens: of decode and prefill.
        new_tokens: that decode generates.
        check_tokens: how much of the first row the loss is checked on.
        threads: to compute with.
        target: folder that ``prepare`` makes.
        bits: of its linears; 0 leaves them dense.
        side: of the matrices that ``matmul`` multiplies.
        valid: of ``epochs``, JSON file with token rows to validate on.
        layers: of ``epochs``, how many at the top are adapted.
        epochs: how many are asked for; the sample after the last is a validation.
        learning_rate: of ``epochs``.
        reuse: of ``epochs``, whether mlxlora keeps what enters the lowest adapted layer: ``auto`` or ``off``.
        order: of ``epochs`` by PyTorch, JSON file with the rows of each step, epoch by epoch.
    """

    task: str
    folder: str = ""
    dtype: str = "float32"
    adapter: bool = False
    fast_blas: bool = False
    rows: str = ""
    batch: int = 4
    prompt_tokens: int = 16
    new_tokens: int = 64
    check_tokens: int = 64
    threads: int = 1
    target: str = ""
    bits: int = 0
    side: int = 1024
    valid: str = ""
    layers: int = 0
    epochs: int = 0
    learning_rate: float = 1e-5
    reuse: str = "off"
    order: str = ""

    def read_valid(self) -> list[list[int]]:
        """The token rows to validate on."""
        rows: list[list[int]] = json.loads(Path(self.valid).read_text())
        return rows

    def read_order(self) -> list[list[list[int]]]:
        """The rows of each step, epoch by epoch."""
        steps: list[list[list[int]]] = json.loads(Path(self.order).read_text())
        return steps

    def read_rows(self) -> list[list[int]]:
        """The token rows."""
        rows: list[list[int]] = json.loads(Path(self.rows).read_text())
        return rows

    @property
    def prompt(self) -> list[int]:
        """The tokens to start generating from."""
        row = self.read_rows()[0]
        return (row * (1 + self.prompt_tokens // len(row)))[: self.prompt_tokens]


class Channel:
    """The worker's end; whatever a library prints goes to stderr and not in between."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **values: Any) -> None:
        """Say one thing."""
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()

    def wait(self) -> None:
        """Wait until the next sample is asked for; leave when none is."""
        if not sys.stdin.readline():
            sys.exit(0)

    def serve(self, samples: Iterator[float], **memory: Any) -> None:
        """Answer with the seconds of one sample each time."""
        while True:
            self.wait()
            self.say(seconds=next(samples), **{name: read() for name, read in memory.items()})


def job() -> Job:
    """The job on the command line."""
    return Job(**json.loads(sys.argv[1]))


def version(*names: str) -> dict[str, str]:
    """Versions of distributions."""
    from importlib.metadata import version

    return {name: version(name) for name in names}
