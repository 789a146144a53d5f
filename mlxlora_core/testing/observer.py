"""The conformance suite of observers.

Subclass :class:`ObserverSuite` in a test file and run it with pytest::

    class TestMyObserver(ObserverSuite):
        spec = my_plugin.OBSERVER

        def check(self, folder, events): ...
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.options import parse
from mlxlora_core.series import RunInfo, Watcher
from mlxlora_core.specs import Observer

Event = Mapping[str, Any]

_TRAIN = {
    "kind": "train",
    "loss": 2.5,
    "learning_rate": 1e-4,
    "grad_norm": 0.7,
    "steps_per_second": 3.0,
    "tokens_per_second": 900.0,
    "trained_tokens": 3000,
    "peak_memory_bytes": 10**9,
    "clipped": 0,
    "skipped": 0,
}


def reports(first: int, last: int) -> list[Event]:
    """The reports of the steps from ``first`` to ``last``, one every 10 steps, and checkpoints."""
    events: list[Event] = []
    for step in range(first, last + 1, 10):
        events.append({**_TRAIN, "step": step, "loss": 2.5 - step / 97})
        events.append({"kind": "checkpoint_saved", "step": step, "seconds": 0.1})
    return events


#: a run that is done in one go
WHOLE: Sequence[Event] = (
    {"kind": "stage_started", "stage": "train", "skipped": False},
    {"kind": "training_started", "step": 0, "steps": 40},
    {"kind": "valid", "step": 0, "loss": 3.0, "tokens": 500, "seconds": 0.5},
    *reports(10, 40),
    {"kind": "spike", "step": 40, "loss": 9.0, "median": 2.2},
    {"kind": "valid", "step": 40, "loss": None, "tokens": 500, "seconds": 0.5},  # not finite
    {"kind": "stage_done", "stage": "train", "result": {"steps": 40, "adapted": ["layers.0.attention.wq"]}},
)


class ObserverSuite:
    """What every observer must do.

    Attributes:
        spec: the observer.
        option_sets: option values to try.
    """

    spec: Observer
    option_sets: Sequence[Mapping[str, Any]] = ({},)

    def check(self, folder: Path, events: Sequence[Event]) -> None:
        """Look at what the observer has left in ``folder`` of a run of these events; nothing by default.

        When a run was taken up again, ``events`` are those that count: each step once.
        """

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every set of options."""
        if "options" in metafunc.fixturenames:
            sets = [parse(self.spec.options, values, owner=self.spec.name) for values in self.option_sets]
            metafunc.parametrize("options", sets, ids=[str(dict(values)) for values in self.option_sets])

    # --- what the tests are made of ---

    def started(self, folder: Path, options: Any) -> Watcher:
        """A watcher of a run in ``folder``."""
        folder.mkdir(exist_ok=True)
        info = RunInfo(folder, "a run", {"train": {"iters": 40}, "adapter": {"rank": 8}})
        return self.spec.start(info, options)

    def watch(self, folder: Path, options: Any, events: Sequence[Event], how: str = "done") -> None:
        """Let a watcher see a run from its start to its end."""
        watcher = self.started(folder, options)
        for event in events:
            watcher.event(copy.deepcopy(dict(event)))
        watcher.end(how)

    # --- the tests ---

    def test_a_whole_run(self, options: Any, tmp_path: Path) -> None:
        """It follows a run to its end."""
        self.watch(tmp_path / "run", options, WHOLE)
        self.check(tmp_path / "run", WHOLE)

    @pytest.mark.parametrize("how", ["interrupted", "failed: a loss is not finite"])
    def test_a_run_that_is_taken_up_again(self, options: Any, how: str, tmp_path: Path) -> None:
        """Stopped at step 30, gone on from the checkpoint of step 20: no step counts twice."""
        head: list[Event] = [{"kind": "training_started", "step": 0, "steps": 40}]
        self.watch(tmp_path / "run", options, [*head, *reports(10, 30)], how)
        again: list[Event] = [{"kind": "training_started", "step": 20, "steps": 40}, *reports(30, 40)]
        self.watch(tmp_path / "run", options, again)
        self.check(tmp_path / "run", [*head, *reports(10, 40)])

    def test_a_run_that_begins_anew(self, options: Any, tmp_path: Path) -> None:
        """What an earlier training in the same place has left does not count."""
        self.watch(tmp_path / "run", options, WHOLE)
        anew: list[Event] = [{"kind": "training_started", "step": 0, "steps": 10}, *reports(10, 10)]
        self.watch(tmp_path / "run", options, anew)
        self.check(tmp_path / "run", anew)

    def test_a_run_in_which_nothing_is_trained(self, options: Any, tmp_path: Path) -> None:
        """A run whose training is done already leaves what there is of it as it was."""
        self.watch(tmp_path / "run", options, WHOLE)
        skipped = {"kind": "stage_started", "stage": "train", "skipped": True}
        self.watch(tmp_path / "run", options, [skipped])
        self.check(tmp_path / "run", WHOLE)

    def test_events_that_it_does_not_know(self, options: Any, tmp_path: Path) -> None:
        """Later versions tell more: other kinds of events, and more of those that there are."""
        told: list[Event] = [
            {"kind": "eclipse", "of": ["the", "sun"]},
            *WHOLE[:2],
            {**reports(10, 10)[0], "mood": "good"},
        ]
        self.watch(tmp_path / "run", options, told)

    def test_events_are_left_as_they_are(self, options: Any, tmp_path: Path) -> None:
        """It changes nothing of what it is told."""
        watcher = self.started(tmp_path / "run", options)
        for event in WHOLE:
            told = copy.deepcopy(dict(event))
            given: Any = watcher.event(told)  # type: ignore[func-returns-value]  # or it does
            assert given is None
            assert told == event
        watcher.end("done")

    def test_stdout_is_not_its_own(
        self, options: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """It prints nothing where results go."""
        self.watch(tmp_path / "run", options, WHOLE)
        assert capfd.readouterr().out == ""

    def test_no_thread_of_it_holds_the_process_up(self, options: Any, tmp_path: Path) -> None:
        """What it has started is a daemon, or ends soon after the run: mlxlora would wait for it for ever."""
        before = set(threading.enumerate())
        self.watch(tmp_path / "run", options, WHOLE)
        for thread in set(threading.enumerate()) - before:
            if not thread.daemon:
                thread.join(10)
                assert not thread.is_alive(), f"{thread.name} is at work 10 s after the end"

    def test_it_writes_in_the_folder_of_the_run(self, options: Any, tmp_path: Path) -> None:
        """What it leaves is in the run's folder, and nothing of it is half-written."""
        self.watch(tmp_path / "run", options, WHOLE)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert not any(path.name.endswith(".tmp") for path in (tmp_path / "run").rglob("*"))
