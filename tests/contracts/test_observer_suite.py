"""The conformance suite over every observer that is registered, and what it must find."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import observers_read
import pytest

from mlxlora_core import plugins as registry
from mlxlora_core.series import RunInfo, figures
from mlxlora_core.specs import Observer
from mlxlora_core.testing.observer import ObserverSuite

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


@pytest.fixture(autouse=True)
def _services(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What services keep outside of a run folder has a place of its own, and nothing is sent."""
    for name, value in observers_read.surroundings(tmp_path_factory.mktemp("services")).items():
        monkeypatch.setenv(name, value)


class _Series(ObserverSuite):
    """Observers whose numbers are read back by ``read(folder)``: curve -> [(step, value)]."""

    __test__ = False
    library = ""
    read: Any

    @pytest.fixture(autouse=True)
    def _library(self, request: pytest.FixtureRequest) -> None:
        observers_read.need(self.library, request.node.name)

    def check(self, folder: Path, events: Sequence[Mapping[str, Any]]) -> None:
        wanted: dict[str, list[tuple[int, float]]] = {}
        for event in events:
            for name, value in figures(event).items():
                wanted.setdefault(name, []).append((event["step"], value))
        found = type(self).read(folder)
        assert wanted and found.keys() == wanted.keys()
        for name, points in wanted.items():
            assert [step for step, _ in found[name]] == [step for step, _ in points], name
            assert [v for _, v in found[name]] == pytest.approx([v for _, v in points], rel=1e-7, abs=0)


class TestTensorboard(_Series):
    __test__ = True
    spec, library = OBSERVERS["tensorboard"], "tensorboardX"
    read = staticmethod(observers_read.tensorboard)


class TestWandb(_Series):
    __test__ = True
    spec, library = OBSERVERS["wandb"], "wandb"
    option_sets = ({"mode": "offline"},)
    read = staticmethod(observers_read.wandb)

    def started(self, folder: Path, options: Any) -> Any:
        """In a second of its own: W&B names the folder of a run offline by it."""
        if (folder / "wandb").exists():
            time.sleep(1.01)
        return super().started(folder, options)


class TestTrackio(_Series):
    __test__ = True
    spec, library = OBSERVERS["trackio"], "trackio"
    read = staticmethod(observers_read.trackio)


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
