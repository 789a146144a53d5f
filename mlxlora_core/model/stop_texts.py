"""Stop texts: found across the borders of tokens, and never shown, not even in part."""

from __future__ import annotations

from collections.abc import Iterable

from mlxlora_core.errors import UsageError


def checked_stops(stop: Iterable[str]) -> tuple[str, ...]:
    """Stop texts, if each can be one.

    Raises:
        UsageError: one is empty, or no text.
    """
    found = tuple(stop)
    for text in found:
        if not isinstance(text, str) or not text:
            raise UsageError(f"a text to stop at is {text!r}", fix="give a text of one character at least")
    return found


class StopTexts:
    """What of a text that comes in parts may be shown; one a text.

    Args:
        stop: texts that end it.

    Attributes:
        found: the stop text that has come, the first to be complete and of several the longest; or None.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self.found: str | None = None
        self._stop, self._held = tuple(stop), ""

    def add(self, part: str) -> str:
        """What may be shown now that ``part`` has come: nothing of a stop text, nor what may begin one."""
        text = self._held + part
        places = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if places:
            end, _, self.found = min(places)
            self._held = ""
            return text[: end - len(self.found)]
        kept = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back, once no more comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` may be the first of ``stop``, but not all of it."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
