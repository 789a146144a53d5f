"""SentencePiece text <-> token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from mlxlora_core.errors import ModelError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
UNFINISHED = "\ufffd"  # what a cut-off UTF-8 sequence decodes to


class Tokenizer:
    """A SentencePiece model.

    Attributes:
        path: the model file.
        vocab_size: number of pieces.
        bos: id that begins a text.
        eos: id that ends one.

    Raises:
        ModelError: the file is absent or is no SentencePiece model, or it has no
            begin or end piece.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelError(
                "there is no tokenizer", where=path, fix="put the checkpoint's tokenizer.model there"
            )
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as fault:
            raise ModelError("is not a SentencePiece model", where=path) from fault
        self.path = path
        self.vocab_size: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise ModelError("the tokenizer has no begin or no end piece", where=path)

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of ``text``, with the begin id in front and, if asked, the end id behind."""
        ids: list[int] = self._model.encode(text)
        return [self.bos] * bos + ids + [self.eos] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; a leading space is given back where the first piece has one."""
        text: str = self._model.decode(list(ids))
        if ids and self._model.id_to_piece(int(ids[0])).startswith(SPACE):
            return " " + text
        return text

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterator[str]:
        """The text of ``ids`` in segments, one after every ``every`` ids.

        Bytes of a character that is not complete yet are held back, so that the
        segments joined are the text of all ids.
        """
        seen: list[int] = []
        shown = 0
        for count, token in enumerate(ids, start=1):
            seen.append(token)
            if count % every:
                continue
            text = self.decode(seen)
            if not text.endswith(UNFINISHED) and len(text) > shown:
                yield text[shown:]
                shown = len(text)
        rest = self.decode(seen)[shown:] if seen else ""
        if rest:
            yield rest

    def fingerprint(self) -> str:
        """SHA-256 of the model file, in hex."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()
