"""A run of trackio."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager, redirect_stdout
from typing import Any

import trackio

from mlxlora_core.api import RunInfo, Series, figures
from mlxlora_trackio import TrackioOptions


class TrackioRun:
    """What a training tells goes to one run, also when it was stopped in between.

    Args:
        run: as an observer is started with it.
        options: where it goes; on this machine that is the folder that ``TRACKIO_DIR`` says.
    """

    def __init__(self, run: RunInfo, options: TrackioOptions) -> None:
        self._info, self._options = run, options
        self._series = Series(run.folder / f"{run.stem}.trackio.json")
        self._run: Any = None

    def event(self, event: Mapping[str, Any]) -> None:
        """Log the numbers of a report."""
        if event["kind"] == "training_started":
            self._begin(event["step"])
        values = figures(event)
        if not values:
            return
        if self._run is None:
            self._begin(0)
        if self._series.is_new(event):
            self._run.log(values, step=event["step"])
            self._series.told(event)

    def end(self, how: str) -> None:
        """Wait until all of it is written."""
        if self._run is not None:
            with _quiet():
                trackio.finish()

    def _begin(self, step: int) -> None:
        self._series.begin(step)
        with _quiet():
            self._run = trackio.init(
                project=self._options.project,
                name=f"{self._info.name}-{self._series.run}",  # which is all that says which run it is
                space_id=self._options.space,
                config={**self._info.config},
                resume="allow" if self._series.resumed else "never",
                embed=False,
            )


def _quiet() -> AbstractContextManager[Any]:
    """trackio tells on stdout at length how it is called."""
    return redirect_stdout(io.StringIO())
