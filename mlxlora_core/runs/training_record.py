"""The record of a training that no run is around: a run folder of one stage, in its folder of checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlxlora_core.errors import ResourceError
from mlxlora_core.files import durable, writable
from mlxlora_core.files.targets import is_written
from mlxlora_core.runs.folder import METRICS, RECIPE, REPORT, RunFolder, fingerprint
from mlxlora_core.runs.observing import INTERRUPTED, how_ended
from mlxlora_core.runs.places import is_recipe
from mlxlora_core.runs.report import is_report, write_report
from mlxlora_core.training import metrics
from mlxlora_core.training.events import (
    SpikeReport,
    TrainingStarted,
    TrainReport,
    TrainResult,
    ValidReport,
    report_line,
)
from mlxlora_core.training.outputs import is_log

T = TypeVar("T")

STAGE = "train"


def open_folder(path: Path) -> RunFolder:
    """The folder of checkpoints of a training, to keep its record in.

    It need not be there, and is not made before there is a record to keep.

    Raises:
        SafetyError: a file of the name of one of the record is of somebody else.
        ResourceError: it cannot be written.
        DataError: the record of an earlier training in it cannot be read.
    """
    writable.check_folder(path)
    for name, ours in ((RECIPE, is_recipe), (METRICS, is_log), (REPORT, is_report)):
        is_written(path / name, ours)
    return RunFolder(path)


@dataclass(frozen=True)
class TrainingRecord:
    """What is kept of a training beside its checkpoints: facts, settings, log, result and report.

    Attributes:
        folder: as :func:`open_folder` gives it.
        facts: what ``run.json`` says of the training beside its result.
        settings: section -> key -> value, for ``recipe.toml``.
        lengths: the histogram of row lengths, as :func:`~mlxlora_core.runs.report.length_counts` gives it.
    """

    folder: RunFolder
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    lengths: Mapping[str, Any]

    def keep(self, events: Iterable[T]) -> Iterator[T]:
        """The events as they come; the record is begun before the first step and ends with a report.

        Raises:
            ResourceError: the record cannot be begun.
        """
        log = self.folder.path / METRICS
        # By the time it began, so that what an earlier training in this folder has found is not taken for it.
        mark = fingerprint({**self.settings, "began": time.time_ns()})
        begun = False
        try:
            for event in events:
                if isinstance(event, TrainingStarted):
                    self.folder.begin({**self.facts, "inputs": {STAGE: mark}}, self.settings)
                    self.folder.start(STAGE, mark)
                    metrics.trim(log, event.step)
                    begun = True
                elif isinstance(event, TrainReport | ValidReport | SpikeReport):
                    with suppress(ResourceError):  # a record that is lost costs the training nothing
                        durable.append_line(log, json.dumps(report_line(event)))
                elif isinstance(event, TrainResult):
                    with suppress(ResourceError):
                        self.folder.keep(STAGE, mark, (METRICS,), asdict(event) | {"lengths": self.lengths})
                yield event
        except BaseException as fault:
            if begun:
                with suppress(Exception):
                    how = INTERRUPTED if isinstance(fault, GeneratorExit) else how_ended(fault)
                    self.folder.stop(how)
            raise
        finally:
            if begun:
                with suppress(Exception):  # what stopped the training is what there is to tell
                    write_report(self.folder.path)
