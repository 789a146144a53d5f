"""The text of tokens that come one by one, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from mlxlora_core.values import Tokenizer

_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character yet


class Text:
    """The text of tokens that follow a prompt, in parts of whole characters.

    What may be the beginning of a stop text is held back until it is known not to be.

    Args:
        tokenizer: whose tokens they are.
        stop: texts of which each ends it; the first that is complete counts, and does not come.

    Attributes:
        stopped: whether a stop text has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._unread: list[int] = []  # ids that are no whole characters yet
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What there is to tell of the text once this token has come."""
        self._unread.append(token)
        text = "".join(self._tokenizer.stream(self._unread))
        if text.endswith(_INCOMPLETE):
            return ""
        self._unread.clear()
        return self._told(text)

    def end(self) -> str:
        """What is left of the text, when no token follows."""
        text = self._told("".join(self._tokenizer.stream(self._unread))) if self._unread else ""
        self._unread.clear()
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _told(self, text: str) -> str:
        """What may be told of a text that follows what is held back."""
        if self.stopped:
            return ""
        whole = self._held + text
        ends = [(place + len(stop), place) for stop in self._stop if (place := whole.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return whole[: min(ends)[1]]
        keep = max((_begun(whole, stop) for stop in self._stop), default=0)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]


def _begun(text: str, stop: str) -> int:
    """How many letters at the end of ``text`` are the beginning of ``stop``."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
