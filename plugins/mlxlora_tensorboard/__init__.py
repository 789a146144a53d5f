"""Observer ``tensorboard``: the curves and settings of a training as event files of TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable

from mlxlora_core.api import NoOptions, Observer, RunInfo, Watcher, hookimpl


def start(run: RunInfo, options: NoOptions) -> Watcher:
    """See :class:`mlxlora_tensorboard.event_files.EventFiles`."""
    from mlxlora_tensorboard.event_files import EventFiles

    return EventFiles(run.folder / f"{run.stem}.tensorboard", run.config)


@hookimpl
def mlxlora_observers() -> Iterable[Observer]:
    """The one observer of this plugin."""
    return [
        Observer(
            name="tensorboard",
            summary="curves and settings as event files of TensorBoard",
            start=start,
            needs={"tensorboardX": "mlxlora[tensorboard]"},
        )
    ]
