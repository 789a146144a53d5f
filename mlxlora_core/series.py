"""For observers: what they are told of; numbers by name, settings as a flat table, and which are new.

Light: it loads neither mlx nor numpy.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlxlora_core.errors import MlxloraError, UsageError
from mlxlora_core.files.documents import read_form
from mlxlora_core.files.durable import write_json
from mlxlora_core.files.forms import Map, Table, Text, Whole

Scalar = str | bool | int | float

_REPORTS = ("train", "valid", "spike")
_FORM = Table({"run": Text(), "steps": Map(Whole())})
_BYTES = 1 << 16


@dataclass(frozen=True)
class RunInfo:
    """A training that begins.

    Attributes:
        folder: where a file of the observer's own goes.
        name: of the recipe, or of the adapter file.
        config: every setting, section by section, as plain values.
        stem: what a file of the observer's own is called, without an ending.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    stem: str = "metrics"


class Watcher(Protocol):
    """What an observer starts: it is told of one run."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Something has happened: a mapping of plain values with ``kind``."""

    def end(self, how: str) -> None:
        """The run has ended: ``done``, ``interrupted`` or ``failed: ...``. Called once, at last."""


def figures(event: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a report, each by the name of its curve, such as ``train/loss``.

    Args:
        event: as an observer is told of it; one that is no report has none.
    """
    kind = event["kind"]
    if kind not in _REPORTS:
        return {}
    return {
        f"{kind}/{name}": float(value)
        for name, value in event.items()
        if name != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def flat_settings(config: Mapping[str, Any]) -> dict[str, Scalar]:
    """The settings of a run as ``section.key`` -> value, for whoever keeps them in one table.

    Args:
        config: as of :class:`RunInfo`; what is not set is left out, and a list is
            written as JSON.
    """
    found: dict[str, Scalar] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": item for inner, item in flat_settings(value).items()}
        elif value is not None:
            found[str(key)] = value if isinstance(value, str | bool | int | float) else _text(value)
    return found


class Series:
    """What a service was told of a training, so that one that is taken up again tells no step twice.

    It stands in a small file: the name that the run has at the service, and the
    last step that was told of each kind of report.

    Args:
        path: of the file; it need not be there.

    Attributes:
        run: the name of the run at the service.
        resumed: whether the run is one of before that goes on.

    Raises:
        UsageError: there is such a file, and it is none of these.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.run, self.resumed = path, "", False
        self._steps: dict[str, int] = {}
        if path.exists():
            try:
                held = read_form(path, _FORM, _BYTES, UsageError)
            except MlxloraError as fault:
                raise UsageError(
                    f"is no record of this observer and was left alone ({fault.what})",
                    where=path,
                    fix="rename it",
                ) from fault
            self.run, self._steps = held["run"], held["steps"]

    def begin(self, step: int) -> None:
        """A training begins at a step; one from 0 on is a run of its own."""
        self.resumed = bool(step and self.run)
        if not self.resumed:
            self.run, self._steps = uuid.uuid4().hex[:12], {}
        self._save()

    def is_new(self, event: Mapping[str, Any]) -> bool:
        """Whether a report has not been told before."""
        return bool(event["step"] > self._steps.get(event["kind"], -1))

    def told(self, event: Mapping[str, Any]) -> None:
        """Keep in mind that a report was told."""
        self._steps[event["kind"]] = event["step"]
        self._save()

    def _save(self) -> None:
        write_json(self.path, {"run": self.run, "steps": self._steps})


def _text(value: Any) -> str:
    return json.dumps(value, default=str)
