"""Observer ``wandb``: the curves and settings of a training as a run at Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlxlora_core.api import Observer, RunInfo, Watcher, hookimpl, option


@dataclass(frozen=True)
class WandbOptions:
    """Where the run goes, and whether now."""

    project: str = option("mlxlora", help="project that the run is in")
    entity: str | None = option(None, help="user or team that it belongs to; none is your own")
    mode: str = option(
        "environment",
        choices=("environment", "online", "offline", "disabled"),
        help="whether it is sent now, or kept for `wandb sync`; environment is what WANDB_MODE says",
    )


def start(run: RunInfo, options: WandbOptions) -> Watcher:
    """See :class:`mlxlora_wandb.service.WandbRun`."""
    from mlxlora_wandb.service import WandbRun

    return WandbRun(run, options)


@hookimpl
def mlxlora_observers() -> Iterable[Observer]:
    """The one observer of this plugin."""
    return [
        Observer(
            name="wandb",
            summary="curves and settings as a run at Weights & Biases",
            options=WandbOptions,
            start=start,
            needs={"wandb": "mlxlora[wandb]"},
        )
    ]
