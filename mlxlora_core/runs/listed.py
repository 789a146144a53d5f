"""Run folders listed: where each stands, its losses, and the settings by which it differs from the others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlxlora_core.errors import DataError, MlxloraError
from mlxlora_core.files.lock import is_held
from mlxlora_core.runs.folder import RECORD
from mlxlora_core.runs.observing import DONE, FAILED, INTERRUPTED
from mlxlora_core.runs.report.facts import Facts, read_facts
from mlxlora_core.series import Scalar, flat_settings

RUNNING, DAMAGED = "running", "damaged"

_DEPTH = 2  # of folders below one that is looked through
_FOLDERS = 10_000  # that are looked at
_PLACES = ("run.folder", "run.name")  # of a run, in which it differs from every other


@dataclass(frozen=True)
class ListedRun:
    """A run folder.

    Attributes:
        path: of it.
        name: of its recipe, or of the training.
        state: ``running``, ``done``, ``interrupted``, ``failed`` or ``damaged``.
        fault: why it failed, or what is damaged.
        step: the last one that was reported.
        steps: that it is to make.
        train_loss: nats per counted token at the last report.
        valid_loss: the same of the last validation.
        test_loss: the same of the test rows when all was done.
        seconds: of training, as reported.
        trained_tokens: counted tokens, as reported.
        settings: ``section.key`` -> value.
        differing: of them, those that are not the same in all runs that are listed with it.
    """

    path: Path
    name: str = ""
    state: str = DAMAGED
    fault: str = ""
    step: int = 0
    steps: int = 0
    train_loss: float | None = None
    valid_loss: float | None = None
    test_loss: float | None = None
    seconds: float = 0.0
    trained_tokens: int = 0
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    differing: Mapping[str, Scalar | None] = field(default_factory=dict)


def list_runs(paths: Iterable[Path]) -> list[ListedRun]:
    """The runs in these folders, each a run folder or one to look through, with what differs marked.

    Raises:
        DataError: one of them is no folder.
    """
    paths = list(paths)
    for path in paths:
        if not os.path.isdir(path):
            raise DataError("there is no such folder", where=path)
    found = {os.path.realpath(path): path for each in paths for path in _run_folders(each)}
    return marked([listed(path) for path in found.values()])


def listed(path: Path) -> ListedRun:
    """One run folder; whatever is in it, there is no error."""
    try:
        return told_by(path, read_facts(path))
    except MlxloraError as damage:
        return ListedRun(path, path.name, fault=str(damage))


def told_by(path: Path, facts: Facts) -> ListedRun:
    """A run folder by what was read of it."""
    state, fault = state_of(path, facts)
    after = facts.results.get("after", {"losses": {}})["losses"]
    return ListedRun(
        path,
        facts.record["recipe"],
        state,
        fault,
        max((report["step"] for report in (*facts.train[-1:], *facts.valid[-1:])), default=0),
        facts.steps,
        facts.train[-1]["loss"] if facts.train else None,
        facts.valid[-1]["loss"] if facts.valid else None,
        after.get("test", {"loss": None})["loss"],
        facts.seconds,
        int(max((report.get("trained_tokens", 0) for report in facts.train[-1:]), default=0)),
        {key: value for key, value in flat_settings(facts.recipe).items() if key not in _PLACES},
    )


def state_of(path: Path, facts: Facts) -> tuple[str, str]:
    """Where a run stands, and why it failed."""
    if "summary" in facts.record or (not facts.is_run and "train" in facts.results):
        return DONE, ""
    if is_held(path):
        return RUNNING, ""
    ended = facts.record.get("ended", INTERRUPTED)  # one that was killed has not told
    if ended.startswith(FAILED):
        return FAILED, ended.removeprefix(FAILED).removeprefix(": ")
    return INTERRUPTED, ""


def marked(runs: Sequence[ListedRun]) -> list[ListedRun]:
    """The runs, each with the settings that are not the same in all of them; None is not set."""
    sound = [run.settings for run in runs if run.state != DAMAGED]
    keys = sorted({key for settings in sound for key in settings})
    differ = [key for key in keys if len({repr(settings.get(key)) for settings in sound}) > 1]

    def of(run: ListedRun) -> ListedRun:
        return replace(run, differing={key: run.settings.get(key) for key in differ})

    return [run if run.state == DAMAGED else of(run) for run in runs]


def _run_folders(path: Path) -> Iterator[Path]:
    """The run folders at and below a folder, in the order of their names; none is looked for in another."""
    left = _FOLDERS
    waiting = [(path, 0)]
    while waiting and left:
        here, depth = waiting.pop()
        left -= 1
        if os.path.lexists(here / RECORD):
            yield here
        elif depth < _DEPTH:
            waiting += [(below, depth + 1) for below in reversed(_folders(here))]


def _folders(path: Path) -> list[Path]:
    """The folders in a folder that are no links, sorted."""
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [path / name for name in sorted(names) if not name.startswith(".")]
