"""A tokenizer in a few lines, for plugins that are given one: letters of ASCII and some words."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlxlora_core.errors import DataError
from mlxlora_core.values import Piece

_BEGIN, _END = 0, 1
_WORDS = ('": ', '", "', '{"', '"}', "}]", "true", "false", "null", " the ", "SELECT ", " FROM ", "\n\n")


class SmallTokenizer:
    """A :class:`mlxlora_core.api.Tokenizer` of some hundred ids; it takes the longest token that fits."""

    vocab_size = 2 + len(string.printable) + len(_WORDS)
    bos: int | None = _BEGIN
    stops = frozenset([_END])
    fingerprint = "small"

    def __init__(self) -> None:
        texts = (*string.printable, *_WORDS)
        self._texts = dict(enumerate(texts, start=2))
        self._ids = {text: number for number, text in self._texts.items()}

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """As :meth:`mlxlora_core.api.Tokenizer.encode`.

        Raises:
            DataError: a letter that is not in ASCII.
        """
        ids, place = [_BEGIN] * bos, 0
        while place < len(text):
            found = max((word for word in self._ids if text.startswith(word, place)), key=len, default="")
            if not found:
                raise DataError(f"there is no token for {text[place]!r}")
            ids.append(self._ids[found])
            place += len(found)
        return [*ids, *[_END] * eos]

    def decode(self, ids: Sequence[int]) -> str:
        """As :meth:`mlxlora_core.api.Tokenizer.decode`."""
        return "".join(self._texts.get(token, "") for token in ids)

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterator[str]:
        """As :meth:`mlxlora_core.api.Tokenizer.stream`."""
        held = ""
        for count, token in enumerate(ids, start=1):
            held += self._texts.get(token, "")
            if held and count % every == 0:
                yield held
                held = ""
        if held:
            yield held

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> Sequence[Piece]:
        """As :meth:`mlxlora_core.api.Tokenizer.render`: ``role: content``, a line each."""
        pieces = [Piece((_BEGIN,), False)]
        for message in messages:
            pieces.append(Piece(tuple(self.encode(f"{message['role']}: ", bos=False)), False))
            ids = self.encode(f"{message['content']}\n", bos=False)
            pieces.append(
                Piece((*ids, _END), True) if message["role"] == "assistant" else Piece(tuple(ids), False)
            )
        if messages[-1]["role"] != "assistant":
            pieces.append(Piece(tuple(self.encode("assistant: ", bos=False)), False))
        return pieces
