"""Observer ``csv``: every report of a training as a row of a table."""

from __future__ import annotations

from collections.abc import Iterable

from mlxlora_core.api import NoOptions, Observer, RunInfo, Watcher, hookimpl


def start(run: RunInfo, options: NoOptions) -> Watcher:
    """See :class:`mlxlora_csv.table.Table`."""
    from mlxlora_csv.table import Table

    return Table(run.folder / f"{run.stem}.csv")


@hookimpl
def mlxlora_observers() -> Iterable[Observer]:
    """The one observer of this plugin."""
    return [Observer(name="csv", summary="every report of a training as a row of a .csv table", start=start)]
