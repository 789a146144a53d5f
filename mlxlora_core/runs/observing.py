"""Observers of a run: each is told of every event, and one that breaks is left out without a trace.

What an observer raises, gives or prints changes neither the run nor its exit
code: it is told of once, as an event of its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from mlxlora_core.errors import MlxloraError
from mlxlora_core.files.documents import finite
from mlxlora_core.machine.signals import Interrupted, is_ours
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Component
from mlxlora_core.plugins.checks import other_arguments, reason_of
from mlxlora_core.plugins.surroundings import kept
from mlxlora_core.training.events import Advanced, SpikeReport, TrainReport, ValidReport, report_line
from mlxlora_core.values import RunInfo, Watcher

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
) -> Iterator[T | ObserverFailed]:
    """The events as they come, each told to the observers before it is passed on.

    Args:
        events: of a run, or of a training.
        observers: each with its options.
        info: what each is started with.
        values: an event in plain values with a ``kind``, or None for one that is not told.

    Raises:
        BaseException: what ``events`` raises; the observers are told that first.
    """
    watchers = _Watchers()
    yield from watchers.start(observers, info)
    try:
        for event in events:
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
    """The watchers that have not broken."""

    def __init__(self) -> None:
        self._active: dict[str, tuple[Component, Watcher]] = {}

    def start(self, observers: Iterable[Choice], info: RunInfo) -> Iterator[ObserverFailed]:
        for choice in observers:
            component = choice.component
            try:
                with _apart(component, "start"):
                    watcher = component.spec.start(copy.deepcopy(info), choice.options)
                self._active[component.id] = component, _checked(component, watcher)
            except BaseException as fault:
                if is_ours(fault):
                    raise
                yield _failed(component.id, "start", fault)

    def tell(self, event: Mapping[str, Any]) -> Iterator[ObserverFailed]:
        yield from self._each("event", lambda watcher: watcher.event(copy.deepcopy(dict(event))))

    def end(self, how: str) -> Iterator[ObserverFailed]:
        yield from self._each("end", lambda watcher: watcher.end(how))

    def _each(self, what: str, call: Callable[[Watcher], None]) -> Iterator[ObserverFailed]:
        for name, (component, watcher) in list(self._active.items()):
            try:
                with _apart(component, what):
                    call(watcher)
            except BaseException as fault:
                if is_ours(fault):
                    raise
                del self._active[name]
                yield _failed(name, what, fault)


def _apart(component: Component, what: str) -> AbstractContextManager[Any]:
    """What a watcher's function runs in: stdout holds the result of the verb."""
    return kept(f"observer {component.id}, in {what},", look=component.plugin.origin != "built-in")


def _checked(component: Component, watcher: Any) -> Watcher:
    """``watcher``, which an observer has started, with the functions that it must have."""
    for name, argument in (("event", "event"), ("end", "how")):
        function = getattr(watcher, name, None)
        if not callable(function):
            raise component.breach("start", type(watcher).__name__, "a watcher with event and end")
        takes = other_arguments(function, (argument,))
        if takes:
            raise component.breach("start", f"a watcher with {name}{takes}", f"{name}({argument})")
    checked: Watcher = watcher
    return checked


def _failed(name: str, what: str, fault: BaseException) -> ObserverFailed:
    reason = str(fault) if isinstance(fault, MlxloraError) else reason_of(fault)
    return ObserverFailed(f"observer {name} failed in {what} and is left out: {reason}")


def how_ended(fault: BaseException) -> str:
    """How a run ended that raised."""
    if isinstance(fault, KeyboardInterrupt | Interrupted):
        return INTERRUPTED
    return f"{FAILED}: {fault if isinstance(fault, MlxloraError) else reason_of(fault)}"
