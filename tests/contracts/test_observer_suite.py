"""The conformance suite over every observer that is registered, and what it must find."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import plugins as registry
from mlxlora_core.specs import Observer
from mlxlora_core.testing.observer import ObserverSuite
from mlxlora_core.values import RunInfo

OBSERVERS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("observer")}


class TestCsv(ObserverSuite):
    spec = OBSERVERS["csv"]

    def check(self, folder: Path, events: Sequence[Mapping[str, Any]]) -> None:
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        reports = [event for event in events if event["kind"] in ("train", "valid", "spike")]
        assert len(rows) == len(reports)
        for row, event in zip(rows, reports, strict=True):
            told = {key: "" if value is None else str(value) for key, value in event.items()}
            assert {key: value for key, value in row.items() if value or key in told} == told


def test_every_observer_is_tested() -> None:
    assert {value.spec.name for name, value in globals().items() if name.startswith("Test")} == set(OBSERVERS)


# --- what the suite must find -------------------------------------------------


class Suite(TestCsv):
    """The suite as a tool, for observers that are broken on purpose."""

    __test__ = False


class Watcher:
    def __init__(self, run: RunInfo) -> None:
        self.run = run

    def event(self, event: dict[str, Any]) -> None:
        with open(self.run.folder / "metrics.csv", "a") as file:
            print(event["kind"], file=file)

    def end(self, how: str) -> None:
        pass


class Changing(Watcher):
    def event(self, event: dict[str, Any]) -> None:
        event.clear()


class Printing(Watcher):
    def event(self, event: dict[str, Any]) -> None:
        print(event)  # noqa: T201 - the fault that is to be found


class Straying(Watcher):
    def end(self, how: str) -> None:
        (self.run.folder.parent / "elsewhere").touch()


def suite(watcher: type[Watcher]) -> Suite:
    made = Suite()
    made.spec = Observer(name="bad", summary="s", start=lambda run, options: watcher(run))
    return made


def test_faults_are_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        suite(Watcher).test_a_run_that_is_taken_up_again(None, "interrupted", tmp_path)
    with pytest.raises(AssertionError):
        suite(Changing).test_events_are_left_as_they_are(None, tmp_path)
    with pytest.raises(AssertionError):
        suite(Printing).test_stdout_is_not_its_own(None, tmp_path, capfd)
    with pytest.raises(AssertionError):
        suite(Straying).test_it_writes_in_the_folder_of_the_run(None, tmp_path)
    with pytest.raises(KeyError):
        suite(Watcher).watch(tmp_path / "run", None, [{"no": "kind"}])
