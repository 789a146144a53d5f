"""Observers of a run: each is told of every event, and one that breaks is left out without a trace.

What an observer raises, gives or prints changes neither the run nor its exit
code: it is told of once, as an event of its own. Nor does one that hangs: each works
in a thread of its own, see :mod:`mlxlora_core.runs.watching`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from mlxlora_core.errors import MlxloraError
from mlxlora_core.files.documents import finite
from mlxlora_core.files.room import Room
from mlxlora_core.machine.signals import Interrupted
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Component
from mlxlora_core.plugins.checks import reason_of
from mlxlora_core.plugins.surroundings import kept
from mlxlora_core.runs.watching import (
    END,
    END_SECONDS,
    EVENT,
    EVENT_SECONDS,
    MOST_EVENTS,
    START,
    START_SECONDS,
    Worker,
    wait_for_all,
)
from mlxlora_core.series import RunInfo
from mlxlora_core.training.events import (
    Advanced,
    SpikeReport,
    TrainingStarted,
    TrainReport,
    ValidReport,
    report_line,
)

T = TypeVar("T")

DONE, INTERRUPTED, FAILED = "done", "interrupted", "failed"


@dataclass(frozen=True)
class ObserverFailed:
    """An observer broke and is left out from here on; ``text`` says why, in one line."""

    text: str


def observed(
    events: Iterable[T],
    observers: Sequence[Choice],
    info: RunInfo,
    values: Callable[[T], Mapping[str, Any] | None],
    written_bytes: Callable[[], int] = lambda: 0,
) -> Iterator[T | ObserverFailed]:
    """The events as they come, each told to the observers before it is passed on.

    Args:
        events: of a run, or of a training.
        observers: each with its options.
        info: what each is started with.
        values: an event in plain values with a ``kind``, or None for one that is not told.
        written_bytes: what a training writes, asked for when it starts: so much room is held for it.

    Raises:
        BaseException: what ``events`` raises; the observers are told that first.
    """
    watchers = _Watchers()
    room = watchers.room
    yield from watchers.start(observers, info)
    try:
        for event in events:
            if observers and isinstance(event, TrainingStarted):
                room.hold(info.folder, written_bytes())
            told = values(event)
            if told is not None:
                yield from watchers.tell(told)
            yield event
    except GeneratorExit:  # whoever listened has gone away
        list(watchers.end(INTERRUPTED))
        raise
    except BaseException as fault:
        yield from watchers.end(how_ended(fault))
        raise
    finally:
        room.release()
    yield from watchers.end(DONE)


def event_values(event: object) -> dict[str, Any] | None:
    """An event of a run or of a training in plain values; ``kind`` is its name, in snake case.

    None for what only moves a bar: observers are told what there is to keep.
    """
    if isinstance(event, Advanced):
        return None
    if isinstance(event, TrainReport | ValidReport | SpikeReport):
        return report_line(event)
    kind = re.sub("(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    values: dict[str, Any] = finite({"kind": kind, **plain(event)})
    return values


class _Watchers:
    """The observers that have not failed, and the room that is held on the disk for the training.

    Attributes:
        room: nothing at first.
    """

    def __init__(self) -> None:
        self._active: list[Worker] = []
        self.room = Room(lambda seconds: wait_for_all(self._active, seconds))

    def start(self, observers: Iterable[Choice], info: RunInfo) -> Iterator[ObserverFailed]:
        """Start each, and wait a moment for it."""
        for choice in observers:
            with _apart(choice.component, START):
                try:
                    worker = Worker(choice, info, self.room)
                except RuntimeError as fault:  # no thread can be had
                    yield _failed(choice.component.id, START, fault)
                    continue
                worker.wait(START_SECONDS)
            self._active.append(worker)
            yield from self._faults()

    def tell(self, event: Mapping[str, Any]) -> Iterator[ObserverFailed]:
        """Tell each, and wait a moment for those that are not behind already."""
        for worker in list(self._active):
            with _apart(worker.component, EVENT):
                behind = worker.behind
                if behind < MOST_EVENTS:
                    worker.event(event)
                if not behind:
                    worker.wait(EVENT_SECONDS)
            if behind >= MOST_EVENTS:
                self._active.remove(worker)
                yield _left_out(worker, f"is {behind} events behind")
        yield from self._faults()
        if not any(worker.behind for worker in self._active):  # or one that fills it would have the room too
            self.room.release_where_full()

    def end(self, how: str) -> Iterator[ObserverFailed]:
        """Tell all of them that it is over, and wait for what they still have to do."""
        yield from self._faults()
        for worker in self._active:
            with _apart(worker.component, END):
                worker.end(how)
                worker.wait(EVENT_SECONDS)
        late = wait_for_all(self._active, END_SECONDS)
        yield from self._faults()
        for worker in late:
            yield _left_out(worker, f"is still at work {END_SECONDS:g} s after the end")

    def _faults(self) -> Iterator[ObserverFailed]:
        """What has come to light; whoever has done wrong is told nothing more."""
        for worker in list(self._active):
            if worker.fault is not None:
                self._active.remove(worker)
                yield _failed(worker.component.id, *worker.fault)


def _apart(component: Component, what: str) -> AbstractContextManager[Any]:
    """What is around while an observer is waited for: stdout holds the result of the verb."""
    return kept(f"observer {component.id}, in {what},", look=component.plugin.origin != "built-in")


def _left_out(worker: Worker, why: str) -> ObserverFailed:
    return ObserverFailed(f"observer {worker.component.id} {why} and is left out")


def _failed(name: str, what: str, fault: BaseException) -> ObserverFailed:
    reason = str(fault) if isinstance(fault, MlxloraError) else reason_of(fault)
    return ObserverFailed(f"observer {name} failed in {what} and is left out: {reason}")


def how_ended(fault: BaseException) -> str:
    """How a run ended that raised."""
    if isinstance(fault, KeyboardInterrupt | Interrupted):
        return INTERRUPTED
    return f"{FAILED}: {fault if isinstance(fault, MlxloraError) else reason_of(fault)}"
