"""What a caller holds of a request: the parts of its text as they come, and a way to end it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from threading import Condition

from mlxlora_core.serving.request import Delta


class Stream:
    """The parts of one text, for one reader: a thread that iterates, or a task that does with ``async for``.

    Reading never holds up the engine: parts that are not read yet wait here.

    Args:
        cancelled: called when the reader ends the request.
    """

    def __init__(self, cancelled: Callable[[], None] = lambda: None) -> None:
        self._parts: deque[Delta] = deque()
        self._changed = Condition()
        self._wake: Callable[[], object] = lambda: None
        self._tell = cancelled
        self._ended = False
        self.cancelled = False

    def cancel(self) -> None:
        """End the request: its place is free from the next step on. From any thread, at any time."""
        self.cancelled = True
        self._tell()

    def put(self, delta: Delta) -> None:
        """Add a part; of the engine."""
        with self._changed:
            self._parts.append(delta)
            self._ended = delta.finish is not None
            self._changed.notify_all()
            wake = self._wake
        with suppress(RuntimeError):  # the reader's event loop is closed
            wake()

    def get(self, timeout: float | None = None) -> Delta:
        """The next part.

        Raises:
            TimeoutError: none came within so many seconds.
            EOFError: the last one has been read.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._parts or self._ended, timeout):
                raise TimeoutError
            if not self._parts:
                raise EOFError
            return self._parts.popleft()

    def __iter__(self) -> Iterator[Delta]:
        while True:
            delta = self.get()
            yield delta
            if delta.finish is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Delta]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._wake = partial(loop.call_soon_threadsafe, changed.set)
        while True:
            changed.clear()
            while self._parts:
                delta = self._parts.popleft()
                yield delta
                if delta.finish is not None:
                    return
            await changed.wait()
