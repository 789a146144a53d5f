"""SentencePiece text <-> token ids."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from mlxlora_core.api import DataError, ModelError, Piece
from mlxlora_core.files import open_regular, read_some, refuse_stand_in
from mlxlora_sentencepiece.chat import turns
from mlxlora_sentencepiece.sentencepiece_file import FILE_BYTES, check_model

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class SentencePieceTokenizer:
    """A SentencePiece model; a :class:`mlxlora_core.api.Tokenizer`.

    Attributes:
        path: the model file.
        vocab_size: number of pieces.
        bos: id that begins a text.
        eos: id that ends one.
        stops: that id alone.
        fingerprint: SHA-256 of the file.

    Raises:
        ModelError: the file is absent or is no SentencePiece model, or it has no
            begin or end piece.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise ModelError(
                "there is no tokenizer", where=path, fix="put the checkpoint's tokenizer.model there"
            )
        content = _read(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self._model.encode(SPACE)  # faults of the unknown piece and of normalisation show here
        except (RuntimeError, ValueError) as fault:
            raise ModelError(f"is not a SentencePiece model: {fault}", where=path) from fault
        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise ModelError("the tokenizer has no begin or no end piece", where=path)
        self.stops = frozenset([self.eos])

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of ``text``, with the begin id in front and, if asked, the end id behind.

        Raises:
            DataError: half a surrogate pair, which no tokenizer has a token for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise DataError(
                f"character {fault.start + 1} of the text is {text[fault.start]!r}, half a surrogate pair",
                fix="write the text in valid UTF-8",
            ) from fault
        ids: list[int] = self._model.encode(text)
        return [self.bos] * bos + ids + [self.eos] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; a leading space is given back where the first piece has one.

        Behind a begin id the space that :meth:`encode` puts in front of a text is
        taken away again, so that a text comes back as it was.
        """
        text = b"".join(map(self._bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._adds_space and self.bos in ids[:1] else text

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterator[str]:
        """The text of ``ids``, which follow others, in segments, one after every ``every`` ids.

        Bytes of a character that is not complete yet are held back, so that the
        segments joined are the text of all ids. No segment is empty.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""
        for count, token in enumerate(ids, start=1):
            held += decoder.decode(self._bytes(token))
            if held and count % every == 0:
                yield held
                held = ""
        held += decoder.decode(b"", final=True)
        if held:
            yield held

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """A conversation in the instruction format of Llama 2, each turn a text of its own.

        Raises:
            DataError: roles that do not alternate, or half a surrogate pair.
        """
        pieces = []
        for prompt, answer in turns(messages):
            asked = self.encode(prompt)
            pieces.append(Piece(tuple(asked), False))
            if answer is not None:
                pieces.append(Piece(tuple(self._answer(prompt, asked, answer)), True))
        return pieces

    def _answer(self, prompt: str, asked: list[int], answer: str) -> list[int]:
        """The ids of ``answer`` behind those of its prompt, end id included.

        Prompt and answer are encoded as one text, as they are read. A model that
        joins the end of the one and the beginning of the other in a piece gets
        them apart, or else generation could not be told what training was.
        """
        whole = self.encode(prompt + answer, eos=True)
        if whole[: len(asked)] == asked:
            return whole[len(asked) :]
        return self.encode(answer, bos=False, eos=True)

    def _bytes(self, token: int) -> bytes:
        """What one id adds to a text; one beyond the vocabulary, which a padded model has, adds nothing."""
        if token >= self.vocab_size or self._model.is_control(token):
            return b""
        piece: str = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:-1], 16)])  # <0xE2>
        if self._model.is_unknown(token):
            piece = self._model.decode([token])
        return piece.replace(SPACE, " ").encode()

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the model puts a space in front of a text."""
        first = self._model.encode("a")[:1]
        return bool(first) and self._model.id_to_piece(first[0]).startswith(SPACE)


def _read(path: Path) -> bytes:
    """The bytes of a tokenizer file, which are those of a SentencePiece model."""
    with open_regular(path) as file:
        refuse_stand_in(file, path)
        content = read_some(file, FILE_BYTES + 1, path)
    if len(content) > FILE_BYTES:
        raise ModelError(f"is larger than {FILE_BYTES >> 20} MiB", where=path)
    check_model(content, path)
    return content
