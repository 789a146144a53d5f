"""Observers: told of everything, and harmless."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DivergedError, UsageError
from mlxlora_core.machine.signals import Interrupted
from mlxlora_core.plugins import Choice, Component, Plugin
from mlxlora_core.plugins.surroundings import kept
from mlxlora_core.runs import observing
from mlxlora_core.runs.events import StageDone, StageStarted
from mlxlora_core.runs.observing import ObserverFailed, event_values, observed
from mlxlora_core.series import RunInfo
from mlxlora_core.specs import NoOptions, Observer
from mlxlora_core.training.events import Advanced, CheckpointSaved, Note, SpikeReport, TrainingStarted

OWNER = Plugin("seen", "seen", "1", "installed", "seen")


class Recorder:
    """Keeps what it is told; ``fails`` maps the number of a call to what it does then."""

    def __init__(self, fails: Mapping[int, Any] | None = None) -> None:
        self.told: list[Any] = []
        self.fails = dict(fails or {})

    def event(self, event: dict[str, Any]) -> None:
        self._tell(dict(event))
        event.clear()

    def end(self, how: str) -> None:
        self._tell(how)

    def _tell(self, what: Any) -> None:
        self.told.append(what)
        fault = self.fails.get(len(self.told))
        if fault is not None:
            raise fault


def observer(name: str, start: Any) -> Choice:
    return Choice(Component("observer", Observer(name=name, summary="s", start=start), OWNER), NoOptions())


def watching(name: str, watcher: Any) -> Choice:
    return observer(name, lambda run, options: watcher)


def values(event: int) -> Mapping[str, Any] | None:
    """Odd numbers are told."""
    return {"kind": "number", "of": [event]} if event % 2 else None


def run(*observers: Choice, fault: BaseException | None = None, count: int = 5) -> Iterator[Any]:
    def events() -> Iterator[int]:
        yield from range(count)
        if fault is not None:
            raise fault

    return observed(events(), observers, RunInfo(Path("folder"), "name", {"a": {"b": 1}}), values)


def test_each_is_told_in_order_and_the_events_pass_through() -> None:
    one, two = Recorder(), Recorder()
    assert list(run(watching("one", one), watching("two", two))) == [0, 1, 2, 3, 4]
    want = [{"kind": "number", "of": [1]}, {"kind": "number", "of": [3]}, "done"]
    assert one.told == want
    assert two.told == want, "what one does to an event, another does not see"


def test_an_event_in_plain_values() -> None:
    assert event_values(StageStarted("train", skipped=True)) == {
        "kind": "stage_started",
        "stage": "train",
        "skipped": True,
    }
    assert event_values(Advanced("training", 3, 9)) is None
    assert event_values(TrainingStarted(3, 9)) == {"kind": "training_started", "step": 3, "steps": 9}
    assert event_values(CheckpointSaved(3, 0.5)) == {"kind": "checkpoint_saved", "step": 3, "seconds": 0.5}
    spike = SpikeReport(3, float("inf"), 2.0)
    told = {"kind": "spike", "step": 3, "loss": None, "loss_is": "infinite", "median": 2.0}
    assert event_values(spike) == told
    assert event_values(Note("memory")) == {"kind": "note", "text": "memory"}
    done = event_values(StageDone("model", {"folder": Path("x"), "adapted": ("wq",)}))
    assert done == {"kind": "stage_done", "stage": "model", "result": {"folder": "x", "adapted": ["wq"]}}


def test_nobody_need_watch() -> None:
    assert list(run()) == [0, 1, 2, 3, 4]


def test_an_event_is_told_before_it_is_passed_on() -> None:
    one = Recorder()
    events = run(watching("one", one))
    assert (next(events), next(events)) == (0, 1)
    assert one.told == [{"kind": "number", "of": [1]}]


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        (
            DivergedError("the loss is not finite", fix="lower it"),
            "failed: the loss is not finite. Fix: lower it",
        ),
        (KeyError("x"), "failed: KeyError: 'x'"),
        (Interrupted(2, "interrupted; go on"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_how_a_run_ended_is_told_and_its_fault_is_the_same(fault: BaseException, how: str) -> None:
    one = Recorder()
    with pytest.raises(type(fault)) as caught:
        list(run(watching("one", one), fault=fault))
    assert caught.value is fault
    assert one.told[-1] == how


def test_a_run_whose_listener_goes_away_is_interrupted() -> None:
    one = Recorder()
    events: Any = run(watching("one", one))
    next(events)
    events.close()
    assert one.told == ["interrupted"]


class Odd(BaseException):
    pass


FAULTS = [
    OSError(28, "no\nspace"),
    SystemExit(0),
    Odd("away"),
    MemoryError(),
    UsageError("no such place", fix="name another"),
    StopIteration(),
    GeneratorExit(),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize(("call", "what"), [(1, "event"), (2, "event"), (3, "end")])
def test_one_that_breaks_is_told_once_and_left_out(fault: BaseException, call: int, what: str) -> None:
    bad, good = Recorder({call: fault, call + 1: fault}), Recorder()
    told = list(run(watching("bad", bad), watching("good", good)))
    warnings = [event for event in told if isinstance(event, ObserverFailed)]
    assert [event for event in told if not isinstance(event, ObserverFailed)] == [0, 1, 2, 3, 4]
    assert len(warnings) == 1
    assert warnings[0].text.startswith(f"observer seen:bad failed in {what} and is left out: ")
    assert warnings[0].text.isprintable()
    assert len(bad.told) == call and good.told[-1] == "done"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_one_that_cannot_start_is_told_and_left_out(fault: BaseException) -> None:
    def start(run: RunInfo, options: Any) -> Any:
        raise fault

    good = Recorder()
    told = list(run(observer("bad", start), watching("good", good)))
    assert told[0].text.startswith("observer seen:bad failed in start and is left out: ")
    assert told[1:] == [0, 1, 2, 3, 4] and good.told[-1] == "done"


def test_a_fault_of_the_run_is_told_to_the_others_when_one_breaks_at_the_end() -> None:
    bad, good = Recorder({3: OSError("x")}), Recorder()
    events = run(watching("bad", bad), watching("good", good), fault=DivergedError("gone"))
    told = []
    with pytest.raises(DivergedError):
        for event in events:
            told.append(event)
    assert isinstance(told[-1], ObserverFailed)
    assert good.told[-1] == "failed: gone"


class NoEnd:
    def event(self, event: Any) -> None: ...


class EndWithoutWord(NoEnd):
    def end(self) -> None: ...


@pytest.mark.parametrize(
    ("watcher", "words"),
    [
        (None, "observer seen:bad: start gives NoneType, wanted a watcher with event and end"),
        (NoEnd(), "start gives NoEnd, wanted a watcher with event and end"),
        (EndWithoutWord(), "start gives a watcher with end() -> 'None', wanted end(how)"),
    ],
)
def test_what_is_no_watcher_is_told(watcher: Any, words: str) -> None:
    told = list(run(watching("bad", watcher)))
    assert words in told[0].text and told[1:] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("call", ["start", "event", "end"])
def test_interrupting_is_no_fault_of_an_observer(call: str) -> None:
    def interrupt() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    class Slow(Recorder):
        def event(self, event: dict[str, Any]) -> None:
            if call == "event":
                interrupt()

        def end(self, how: str) -> None:
            if call == "end":
                interrupt()

    def start(run: RunInfo, options: Any) -> Any:
        if call == "start":
            interrupt()
        return Slow()

    with pytest.raises(KeyboardInterrupt):
        list(run(observer("slow", start)))


class Stuck(Recorder):
    """Hangs in the call of that number until it is let go."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call, self.go = call, threading.Event()

    def _tell(self, what: Any) -> None:
        super()._tell(what)
        if len(self.told) == self.call:
            assert self.go.wait(60)


def test_one_that_hangs_holds_up_nothing_and_is_told_all_when_it_goes_on() -> None:
    stuck, good = Stuck(1), Recorder()
    events = run(watching("stuck", stuck), watching("good", good), count=200)
    assert [next(events) for _ in range(199)] == [*range(199)], "steps go on while it hangs"
    assert len(stuck.told) == 1 and len(good.told) == 99, "and the others are told"
    stuck.go.set()
    assert list(events) == [199]
    assert stuck.told == good.told and stuck.told[-1] == "done"


@pytest.mark.parametrize("call", ["start", "event", "end"])
def test_one_that_never_goes_on_is_left_behind_with_one_warning(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "END_SECONDS", 0.3)
    monkeypatch.setattr(observing, "START_SECONDS", 0.1)
    go, good = threading.Event(), Recorder()
    stuck = Stuck({"start": 0, "event": 2, "end": 3}[call])

    def start(run: RunInfo, options: Any) -> Any:
        assert call != "start" or go.wait(60)
        return stuck

    told = list(run(observer("stuck", start), watching("good", good)))
    assert told[:-1] == [0, 1, 2, 3, 4] and good.told[-1] == "done"
    assert told[-1].text == "observer seen:stuck is still at work 0.3 s after the end and is left out"
    go.set(), stuck.go.set()


def test_one_that_is_far_behind_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "MOST_EVENTS", 5)
    stuck, good = Stuck(1), Recorder()
    told = list(run(watching("stuck", stuck), watching("good", good), count=40))
    warnings = [event.text for event in told if isinstance(event, ObserverFailed)]
    assert warnings == ["observer seen:stuck is 5 events behind and is left out"]
    assert len(good.told) == 21
    stuck.go.set()


def test_a_fault_that_comes_late_is_told_once() -> None:
    stuck, good = Stuck(1), Recorder()
    stuck.fails = {2: OSError("x")}
    events = run(watching("stuck", stuck), watching("good", good), count=20)
    told = [next(events) for _ in range(11)]
    stuck.go.set()
    told += events
    assert [type(event) for event in told].count(ObserverFailed) == 1
    assert len(stuck.told) == 2 and good.told[-1] == "done"


def test_all_calls_come_in_one_thread() -> None:
    """Libraries that observers use may rely on it."""
    threads = []

    class Here(Recorder):
        def _tell(self, what: Any) -> None:
            threads.append(threading.get_ident())

    def start(run: RunInfo, options: Any) -> Any:
        threads.append(threading.get_ident())
        return Here()

    list(run(observer("here", start)))
    assert len(threads) == 4 and len({*threads}) == 1 and threads[0] != threading.get_ident()


def test_stdout_is_as_it_was_after_one_that_was_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "START_SECONDS", 0.01)
    go, left, stdout = threading.Event(), threading.Event(), sys.stdout

    def start(run: RunInfo, options: Any) -> Any:
        with kept("the observer", look=False):  # as functions of plugins are called
            assert go.wait(60)
        left.set()
        return Recorder()

    events = run(observer("slow", start))
    assert next(events) == 0
    go.set()
    assert left.wait(60) and sys.stdout is stdout
    assert list(events) == [1, 2, 3, 4] and sys.stdout is stdout


def test_what_it_prints_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    class Loud(Recorder):
        def event(self, event: dict[str, Any]) -> None:
            sys.stdout.write("event ")

        def end(self, how: str) -> None:
            sys.stdout.write("end")

    list(run(observer("loud", lambda run, options: sys.stdout.write("start ") and Loud())))
    assert capsys.readouterr() == ("", "start event event end")


def test_what_one_does_to_the_settings_another_does_not_see() -> None:
    seen = []

    def start(run: RunInfo, options: Any) -> Any:
        seen.append(dict(run.config["a"]))
        run.config["a"].clear()
        return Recorder()

    list(run(observer("one", start), observer("two", start)))
    assert seen == [{"b": 1}, {"b": 1}]
