"""A run at Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import wandb

from mlxlora_core.api import RunInfo, Series, UsageError, figures
from mlxlora_wandb import WandbOptions


class WandbRun:
    """What a training tells goes to one run, also when it was stopped in between.

    The run is begun where the training begins, so that a run folder whose
    training is done already leaves it as it is.

    Args:
        run: as an observer is started with it.
        options: where it goes.

    Raises:
        UsageError: it is to be sent now, and nobody is logged in: W&B would ask, and wait.
    """

    def __init__(self, run: RunInfo, options: WandbOptions) -> None:
        self._info, self._options = run, options
        self._series = Series(run.folder / f"{run.stem}.wandb.json")
        self._run: Any = None
        self._settings = wandb.Settings(
            console="off",  # stdout and stderr are not its own
            silent=True,
            root_dir=str(run.folder),
        )
        if options.mode != "environment":
            self._settings.mode = options.mode
        if self._settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UsageError(
                "nobody is logged in at Weights & Biases",
                fix="wandb login, or --set observe.mode=offline and later: wandb sync",
            )

    def event(self, event: Mapping[str, Any]) -> None:
        """Send the numbers of a report."""
        if event["kind"] == "training_started":
            self._begin(event["step"])
        values = figures(event)
        if not values:
            return
        if self._run is None:
            self._begin(0)
        if self._series.is_new(event):
            self._run.log({**values, "step": event["step"]})
            self._series.told(event)

    def end(self, how: str) -> None:
        """End the run; at the service it can be gone on with."""
        if self._run is not None:
            self._run.summary["ended"] = how
            self._run.finish(exit_code=0 if how == "done" else 1)

    def _begin(self, step: int) -> None:
        self._series.begin(step)
        self._run = wandb.init(
            project=self._options.project,
            entity=self._options.entity,
            id=self._series.run,
            name=self._info.name,
            resume="allow" if self._series.resumed else None,
            config=dict(self._info.config),
            settings=self._settings,
        )
        # A step of training is a column: W&B's own counter takes none twice.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
