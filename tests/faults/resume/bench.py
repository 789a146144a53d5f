"""A bench to run command lines on: a fork server, a tiny base, and a training that can be killed anywhere."""

from __future__ import annotations

import json
import random
import shlex
from dataclasses import dataclass
from pathlib import Path

from forkserver import Ended, ForkServer

# Dropout, accumulation, a schedule and an epoch that ends in the middle: all that a resume can get wrong.
TRAIN = shlex.split("""
    train --iters 40 --save-every 8 --batch-size 2 --grad-accumulation 2 --learning-rate 1e-2
    --optimizer adamw --schedule cosine --warmup 5 --grad-clip 1 --steps-per-eval 15 --steps-per-report 6
    --lora-layers 1 --set adapter.dropout=0.2 --set adapter.rank=2""")


@dataclass(frozen=True)
class Bench:
    """A base, rows, and a server to run command lines on them.

    Attributes:
        folder: read what is in it, write beside.
        checkpoint: a tiny Llama checkpoint in the Meta layout.
        server: runs command lines in children.
    """

    folder: Path
    checkpoint: Path
    server: ForkServer

    @property
    def model(self) -> Path:
        """A float32 model folder of 27 thousand parameters."""
        return self.folder / "model"

    @property
    def data(self) -> Path:
        """A dataset folder: 14 short rows to train on, 3 to validate on."""
        return self.folder / "data"

    def train(self, folder: Path, *more: object) -> list[object]:
        """The command that trains :data:`TRAIN` in ``folder``."""
        files = ("--model", self.model, "--data", self.data)
        outputs = ("--adapter-file", folder / "a.safetensors", "--metrics-file", folder / "metrics.jsonl")
        return [*TRAIN, *files, *outputs, *more]

    def run(self, *arguments: object) -> Ended:
        """Run a command that must succeed."""
        ended = self.server.run(arguments)
        assert ended.code == 0, ended.err
        return ended


def write_rows(folder: Path) -> None:
    """Write the rows of :attr:`Bench.data`, the same each time."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randrange(5, 20))) for _ in range(17)]
    folder.mkdir()
    for name, part in (("train", texts[:14]), ("valid", texts[14:]), ("test", texts[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
