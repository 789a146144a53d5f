"""The event files of a training, written by tensorboardX, which needs no TensorFlow.

Its ``SummaryWriter`` hands events to a thread of its own; when the disk is full
that thread ends, and whoever flushes next waits for ever. So the events are
written here by the writer below it, at once, and what fails is raised.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams, scalar

from mlxlora_core.api import figures, flat_settings

_PREFIX = "events.out.tfevents."
#: the curve that TensorBoard sets the settings of several runs against
_RESULT = "valid/loss"


class EventFiles:
    """A folder of event files: one for each time that the training was begun or taken up again.

    A file that goes on from a step begins with TensorBoard's own word for that,
    by which points behind that step are left out.

    Args:
        folder: made when the training begins.
        config: the settings, section by section.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self._settings = folder, flat_settings(config)
        self._writer: Any = None

    def event(self, event: Mapping[str, Any]) -> None:
        """Write the numbers of a report; make a file ready where a training begins."""
        if event["kind"] == "training_started":
            self._begin(event["step"])
        values = figures(event)
        if not values:
            return
        if self._writer is None:
            self._begin(0)
        for name, value in values.items():
            self._write(event["step"], scalar(name, value))
        self._writer.flush()

    def end(self, how: str) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _begin(self, step: int) -> None:
        """A file of its own; what an earlier training has left is removed at the start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = sorted(self.folder.glob(f"{_PREFIX}*"))
        if not step:
            for path in before:
                path.unlink()
        number = int(before[-1].suffix[1:]) + 1 if step and before else 0
        # By number too: files of one second are read in the order of their names.
        self._writer = EventsWriter(str(self.folder / "events"), f".{number:06d}")
        if step:
            started = Event(wall_time=time.time(), step=step + 1)
            started.session_log.status = SessionLog.START
            self._writer.write_event(started)
        for summary in hparams(self._settings, {_RESULT: 0.0})[:2]:  # the third ends a session
            self._write(0, summary)
        self._writer.flush()

    def _write(self, step: int, summary: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
