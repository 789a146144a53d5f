"""Every event of a training as a line of JSON."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import NoOptions, Observer, RunInfo, hookimpl
from mlxlora_core.files import append_line, write_text


class Log:
    """Writes from the moment that a training begins; what comes before waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before: list[str] = []
        self.training = False

    def event(self, event: Mapping[str, Any]) -> None:
        """Write an event down."""
        if event["kind"] == "training_started":
            write_text(self.path, "".join(line + "\n" for line in [*self._kept(event["step"]), *self.before]))
            self.training = True
        self._line(dict(event))

    def end(self, how: str) -> None:
        """Write down how it ended."""
        if self.training:
            self._line({"kind": "end", "how": how})

    def _kept(self, step: int) -> list[str]:
        """Lines of an earlier run that this one goes on from."""
        if step == 0 or not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if json.loads(line).get("step", step + 1) <= step]

    def _line(self, value: dict[str, Any]) -> None:
        line = json.dumps(value)
        if self.training:
            append_line(self.path, line)
        else:
            self.before.append(line)


def start(run: RunInfo, options: NoOptions) -> Log:
    """A log in the run's folder."""
    return Log(run.folder / f"{run.stem}.events.jsonl")


@hookimpl
def mlxlora_observers() -> Iterable[Observer]:
    """The observer."""
    return [Observer(name="eventlog", summary="every event as a line of JSON", start=start)]
