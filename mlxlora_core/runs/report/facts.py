"""What a report is made of, read from a run folder."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxlora_core.errors import DataError
from mlxlora_core.runs.folder import METRICS, RECIPE, RECORD, RunFolder


@dataclass(frozen=True)
class Facts:
    """A run so far.

    Attributes:
        record: ``run.json``.
        recipe: ``recipe.toml``, section -> key -> value.
        results: stage -> what it found, of the stages that are done for this recipe.
        train: reports of training in the order of their steps; only finite numbers.
        valid: validations in the order of their steps.
    """

    record: Mapping[str, Any]
    recipe: Mapping[str, Any]
    results: Mapping[str, Any] = field(default_factory=dict)
    train: tuple[Mapping[str, float], ...] = ()
    valid: tuple[Mapping[str, float], ...] = ()


def read_facts(folder: Path) -> Facts:
    """Read a run folder, whose run may still be going on.

    Raises:
        DataError: it is no run folder, or cannot be read.
    """
    record = RunFolder(folder).record
    if not record:
        raise DataError("is no run folder", where=folder, fix="name the folder that mlxlora run has made")
    try:
        recipe = tomllib.loads((folder / RECIPE).read_text("utf-8"))
    except (OSError, ValueError) as fault:
        raise DataError(f"cannot be read: {fault}", where=folder / RECIPE, fix="run again") from fault
    try:
        inputs, started, stages = record["inputs"], record["started"], record["stages"]
        results = {n: stage["result"] for n, stage in stages.items() if stage["inputs"] == inputs.get(n)}
        ours = started.get("train") == inputs["train"]
    except (KeyError, TypeError, AttributeError) as fault:
        raise DataError(
            f"is no record of a run of this version: {fault!r}", where=folder / RECORD, fix="run again"
        ) from fault
    # Metrics of an earlier training stay until the next one begins.
    reports = _metrics(folder / METRICS) if ours else {}
    return Facts(
        record,
        recipe,
        results,
        *(tuple(reports[key] for key in sorted(reports) if key[0] == kind) for kind in ("train", "valid")),
    )


def _metrics(path: Path) -> dict[tuple[str, float], dict[str, float]]:
    """(kind, step) -> the numbers of a report; a line that is not whole yet is passed over."""
    reports = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as fault:
        raise DataError(f"cannot be read: {fault.strerror}", where=path) from fault
    for line in lines:
        try:
            values = json.loads(line)
            numbers = {key: value for key, value in values.items() if _finite(value)}
            if "loss" in numbers:
                reports[str(values["kind"]), numbers["step"]] = numbers
        except (ValueError, KeyError, AttributeError):
            continue
    return reports


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
