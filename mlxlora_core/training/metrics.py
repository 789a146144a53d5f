"""The log of a training, ``metrics.jsonl``: a report a line, read back."""

from __future__ import annotations

import math
from pathlib import Path

from mlxlora_core.errors import DataError
from mlxlora_core.files import durable
from mlxlora_core.files.documents import parse_json
from mlxlora_core.files.forms import UNSOUND, Maybe, Number, Option, Table, Text, Whole, sound

#: figures of a report that are drawn, beside its loss
FIGURES = ("learning_rate", "grad_norm", "tokens_per_second", "padding", "peak_memory_bytes")
#: figures of which a time is made
TIMES = ("steps_per_second", "seconds")

#: figures that are told and not drawn
COUNTS = ("trained_tokens",)

#: a line that is drawn; one whose loss is null was not finite, and another figure that is null is left out
REPORT_FORM = Table(
    {
        "kind": Text(("train", "valid")),
        "step": Whole(),
        "loss": Maybe(Number()),
        **dict.fromkeys((*FIGURES, *TIMES, *COUNTS), Option(Number())),
    }
)

_ANY_REPORT = Table({"step": Whole()})


def trim(path: Path, step: int) -> int:
    """Leave only the whole lines up to ``step``, so that no step comes twice; none of them at the start.

    Returns:
        The last step that is told of; 0 for none.

    Raises:
        ResourceError: it cannot be written.
    """
    lines = path.read_bytes().split(b"\n") if step and path.is_file() else []
    steps = [_step_of(line, path) for line in lines]
    kept = [line + b"\n" for line, at in zip(lines, steps, strict=True) if at <= step]
    durable.write_file(path, b"".join(kept))
    return int(max((at for at in steps if at <= step), default=0))


def _step_of(line: bytes, path: Path) -> float:
    """The step of a line; infinite for one that is torn."""
    try:
        report, _ = sound(_ANY_REPORT, parse_json(line, path, DataError))
    except DataError:
        return math.inf
    return math.inf if report is UNSOUND else int(report["step"])
