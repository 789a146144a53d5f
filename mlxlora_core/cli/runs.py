"""``mlxlora runs``: the run folders that there are, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.session import JSON_OPTION, verb
from mlxlora_core.errors import one_line, short
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.listed import DAMAGED, ListedRun, list_runs
from mlxlora_core.runs.report.parts import duration

_VALUE_LETTERS = 40
_FAULT_LETTERS = 100
_ABSENT = "-"


@verb(click.argument("folders", nargs=-1, type=declare.INPUT, metavar="[FOLDER]..."), JSON_OPTION)
def command(registry: Registry, folders: tuple[Path, ...], as_json: bool) -> None:
    """List run folders, with state and losses, and the settings in which they differ.

    FOLDER is a run folder, the folder of checkpoints of a training, or a folder
    to look through; the working folder, if none is named. Of the settings only
    those are shown that are not the same in all of them.
    """
    found = list_runs(folders or (Path(),))
    if as_json:
        show.as_json([{**asdict(run), "path": str(run.path)} for run in found])
        return
    if not found:
        show.progress("there is no run folder here")
        return
    headings = ("run", "recipe", "state", "step", "train loss", "valid loss", "test loss", "time", "tokens")
    show.table(headings, [_row(run) for run in found])
    _tell_differences([run for run in found if run.state != DAMAGED])


def _row(run: ListedRun) -> Sequence[str]:
    """A run in the cells of a row."""
    fault = f": {short(one_line(run.fault), _FAULT_LETTERS)}" if run.fault else ""
    if run.state == DAMAGED:
        return (str(run.path), _ABSENT, f"{run.state}{fault}", *[_ABSENT] * 6)
    losses = (run.train_loss, run.valid_loss, run.test_loss)
    return (
        str(run.path),
        run.name,
        run.state + fault,
        f"{run.step}/{run.steps}",
        *(_ABSENT if loss is None else f"{loss:.4f}" for loss in losses),
        duration(run.seconds) if run.step else _ABSENT,
        f"{run.trained_tokens:,}",
    )


def _tell_differences(runs: Sequence[ListedRun]) -> None:
    """A table of the settings that are not the same in all runs, a column a run."""
    if not runs or not runs[0].differing:
        return
    show.result()
    rows = [
        (key, *(_ABSENT if run.differing[key] is None else _value(run.differing[key]) for run in runs))
        for key in runs[0].differing
    ]
    show.table(("setting that differs", *(str(run.path) for run in runs)), rows)


def _value(value: object) -> str:
    return short(str(value), _VALUE_LETTERS)
