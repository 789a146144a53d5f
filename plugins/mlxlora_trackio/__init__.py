"""Observer ``trackio``: the curves and settings of a training as a run of trackio."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlxlora_core.api import Observer, RunInfo, Watcher, hookimpl, option


@dataclass(frozen=True)
class TrackioOptions:
    """Where the run goes."""

    project: str = option("mlxlora", help="project that the run is in")
    space: str | None = option(
        None, help="Space of Hugging Face that it is sent to; none keeps it on this machine"
    )


def start(run: RunInfo, options: TrackioOptions) -> Watcher:
    """See :class:`mlxlora_trackio.dashboard.TrackioRun`."""
    from mlxlora_trackio.dashboard import TrackioRun

    return TrackioRun(run, options)


@hookimpl
def mlxlora_observers() -> Iterable[Observer]:
    """The one observer of this plugin."""
    return [
        Observer(
            name="trackio",
            summary="curves and settings as a run of trackio",
            options=TrackioOptions,
            start=start,
            needs={"trackio": "mlxlora[trackio]"},
        )
    ]
