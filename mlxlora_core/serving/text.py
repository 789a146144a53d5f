"""The text of tokens that come one by one, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from mlxlora_core.model.stop_texts import StopTexts
from mlxlora_core.values import Tokenizer

_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character yet


class Text:
    """The text of tokens that follow a prompt, in parts of whole characters.

    What may be the beginning of a stop text is held back until it is known not to be.

    Args:
        tokenizer: whose tokens they are.
        stop: texts of which each ends it; the first that is complete counts, and does not come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, StopTexts(stop)
        self._unread: list[int] = []  # ids that are no whole characters yet

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._stops.found is not None

    def add(self, token: int) -> str:
        """What there is to tell of the text once this token has come."""
        self._unread.append(token)
        text = "".join(self._tokenizer.stream(self._unread))
        if text.endswith(_INCOMPLETE):
            return ""
        self._unread.clear()
        return self._stops.add(text)

    def end(self) -> str:
        """What is left of the text, when no token follows."""
        if self.stopped:
            return ""
        text = "".join(self._tokenizer.stream(self._unread)) if self._unread else ""
        self._unread.clear()
        told = self._stops.add(text)
        return told if self.stopped else told + self._stops.rest()
