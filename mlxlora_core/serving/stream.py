"""What a caller holds of a request: the parts of its text as they come, and a way to end it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from threading import Condition

from mlxlora_core.serving.request import Delta


class Stream:
    """The parts of one text, for one reader: a thread that iterates, a task that does with ``async for``, or
    a function that is called with each.

    Reading never holds up the engine: parts that are not read yet wait here.

    Args:
        cancelled: called when the reader ends the request.
    """

    def __init__(self, cancelled: Callable[[], None] = lambda: None) -> None:
        self._parts: deque[Delta] = deque()
        self._changed = Condition()
        self._callback: Callable[[Delta], object] | None = None
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
            self._ended = delta.finish is not None
            if self._callback is None:
                self._parts.append(delta)
                self._changed.notify_all()
            else:
                self._call(delta)

    def on_delta(self, callback: Callable[[Delta], object]) -> None:
        """Give each part to a function, in their order: at once those that have come, then each as it comes.

        Args:
            callback: called from the engine's thread, which waits for it: it must not block. One that raises,
                such as of an event loop that is closed, is called no more, and ends the request.
        """
        with self._changed:
            self._callback = callback
            while self._parts:
                self._call(self._parts.popleft())

    def _call(self, delta: Delta) -> None:
        """Give a part to the reader's function; the lock is held."""
        assert self._callback is not None
        try:
            self._callback(delta)
        except Exception:  # the reader's fault, of which the engine and its other readers learn nothing
            self._callback = lambda _: None
            self.cancel()

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
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Delta]()
        self.on_delta(lambda delta: loop.call_soon_threadsafe(parts.put_nowait, delta))
        while True:
            delta = await parts.get()
            yield delta
            if delta.finish is not None:
                return
