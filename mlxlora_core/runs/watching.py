"""An observer at work: in a thread of its own, so that one that hangs holds up nothing for long.

Start, every event and the end come to it in one thread, in order. It is waited for
a moment each time, so that what it does wrong shows where it does it; whoever is slower works
on what it was told while the training goes on.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from mlxlora_core.files.room import Room, is_full
from mlxlora_core.plugins import Choice, Component
from mlxlora_core.plugins.checks import other_arguments
from mlxlora_core.series import RunInfo, Watcher

START_SECONDS = 2.0  # so long the start of an observer is waited for
EVENT_SECONDS = 0.05  # so long it is waited for at an event, where it is not behind already
END_SECONDS = 10.0  # so long all observers together are waited for when a run has ended
MOST_EVENTS = 1000  # that an observer may be behind

START, EVENT, END = "start", "event", "end"


class Worker:
    """One observer and its thread.

    Args:
        choice: the observer with its options.
        info: what it is started with.
        room: held on the disk, and let go where the observer finds none.

    Attributes:
        component: the observer.
        fault: what it did wrong and in which of its functions, once it has; it is told nothing more.
    """

    def __init__(self, choice: Choice, info: RunInfo, room: Room) -> None:
        self.component, self._room = choice.component, room
        self.fault: tuple[str, BaseException] | None = None
        self._watcher: Watcher | None = None
        self._told = threading.Condition()  # guards what follows
        self._tasks: deque[tuple[str, Callable[[], None]]] = deque()
        self._open = 0  # tasks that are not done
        self._give(START, lambda: self._start(choice, copy.deepcopy(info)))
        # A daemon: the process can end while an observer hangs.
        threading.Thread(target=self._work, name=f"observer {self.component.id}", daemon=True).start()

    @property
    def behind(self) -> int:
        """How many of its calls are not done."""
        return self._open

    def event(self, event: Mapping[str, Any]) -> None:
        """Tell it what has happened."""
        told = copy.deepcopy(dict(event))
        self._give(EVENT, lambda: self._watching.event(told))

    def end(self, how: str) -> None:
        """Tell it that the run has ended; nothing more is told."""
        self._give(END, lambda: self._watching.end(how))

    def wait(self, seconds: float) -> bool:
        """Wait until all that it was told is done, or it has done something wrong; whether that is so."""
        with self._told:
            return self._told.wait_for(lambda: not self._open or self.fault is not None, max(seconds, 0.0))

    @property
    def _watching(self) -> Watcher:
        assert self._watcher is not None, "events come after the start"
        return self._watcher

    def _give(self, what: str, call: Callable[[], None]) -> None:
        with self._told:
            self._tasks.append((what, call))
            self._open += 1
            self._told.notify_all()

    def _start(self, choice: Choice, info: RunInfo) -> None:
        self._watcher = _checked(self.component, self.component.spec.start(info, choice.options))

    def _work(self) -> None:
        """Do what comes, to the end or to the first fault."""
        what = ""
        while what != END and self.fault is None:
            with self._told:
                self._told.wait_for(lambda: bool(self._tasks))
                what, call = self._tasks.popleft()
            fault = None
            try:
                call()
            except BaseException as raised:  # a signal comes to the main thread alone
                fault = what, raised
                if is_full(raised):
                    self._room.release()  # at once: the training may be writing now
            with self._told:
                self.fault = fault
                self._open -= 1
                self._told.notify_all()


def wait_for_all(workers: list[Worker], seconds: float) -> list[Worker]:
    """Wait so long for all of them together; those that are still at work."""
    end = time.monotonic() + seconds
    return [worker for worker in workers if not worker.wait(end - time.monotonic())]


def _checked(component: Component, watcher: Any) -> Watcher:
    """``watcher``, which an observer has started, with the functions that it must have."""
    for name, argument in ((EVENT, "event"), (END, "how")):
        function = getattr(watcher, name, None)
        if not callable(function):
            raise component.breach(START, type(watcher).__name__, "a watcher with event and end")
        takes = other_arguments(function, (argument,))
        if takes:
            raise component.breach(START, f"a watcher with {name}{takes}", f"{name}({argument})")
    checked: Watcher = watcher
    return checked
