"""SentencePiece text <-> token ids."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from mlxlora_core.api import DataError, ModelError, Piece, listing
from mlxlora_core.files import file_bytes
from mlxlora_sentencepiece.chat import ASK, ASKED, SYSTEM, SYSTEM_END, Form, Vocabulary, pieces
from mlxlora_sentencepiece.sentencepiece_file import FILE_BYTES, check_model

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

#: how many pieces Mistral's first vocabulary has, and the SHA-256 of their texts, a line feed behind each
MISTRAL_1 = (32000, "35c28c8df590b200c16cf9ec7a4573b3230fed9cde1bbd8d9ea57e1c4ba796fd")

# Pieces in which other families write conversations.
_OTHER_FORMS = ("<start_of_turn>", "<|im_start|>", "<|user|>", "<|start_header_id|>", "<|User|>")
_TOKEN = re.compile(r"[<\[].+[>\]]")  # how pieces are spelt that stand for something else than text


class SentencePieceTokenizer:
    """A SentencePiece model; a :class:`mlxlora_core.api.Tokenizer`.

    Attributes:
        path: the model file, or what it would be called.
        vocab_size: number of pieces.
        bos: id that begins a text.
        eos: id that ends one.
        stops: that id alone.
        fingerprint: SHA-256 of the file.

    Raises:
        ModelError: the file is absent or is no SentencePiece model, or it has no
            begin or end piece.
    """

    def __init__(self, source: Path | bytes) -> None:
        path = source if isinstance(source, Path) else Path("tokenizer.model")
        if isinstance(source, Path) and not source.exists():
            raise ModelError(
                "there is no tokenizer", where=path, fix="put the checkpoint's tokenizer.model there"
            )
        content = file_bytes(source, FILE_BYTES, path)
        defined = check_model(content, path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self._model.encode(SPACE)  # faults of the unknown piece and of normalisation show here
        except (RuntimeError, ValueError) as fault:
            raise ModelError(f"is not a SentencePiece model: {fault}", where=path) from fault
        self._defined = defined
        self._texts: dict[int, bytes] = {}  # id -> what it adds to a text
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
        """A conversation in the form that goes with the vocabulary.

        Raises:
            DataError: roles that do not alternate, or half a surrogate pair.
        """
        return pieces(self._form, messages, self._vocabulary)

    @property
    def chat_form(self) -> str:
        """The form of :meth:`render` in words."""
        return self._form.value

    @property
    def chat_warning(self) -> str:
        """What speaks against that form, or nothing."""
        others = [piece for piece in _OTHER_FORMS if piece in self._named]
        return f"the vocabulary has {listing(others)} for another form" if others else ""

    @property
    def special_texts(self) -> frozenset[str]:
        """How the pieces are written that are no ordinary text."""
        return frozenset({*self._named, self._model.id_to_piece(self._model.unk_id())})

    def _bytes(self, token: int) -> bytes:
        """What one id adds to a text; one beyond the vocabulary, which a padded model has, adds nothing."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = self._bytes_of_piece(token)
        return known

    def _bytes_of_piece(self, token: int) -> bytes:
        if token >= self.vocab_size or self._model.is_control(token):
            return b""
        piece: str = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:-1], 16)])  # <0xE2>
        if self._model.is_unknown(token):
            piece = self._model.decode([token])
        return piece.replace(SPACE, " ").encode()

    @cached_property
    def _form(self) -> Form:
        """The form of conversations that goes with the vocabulary."""
        if {ASK, ASKED} <= self._named.keys():
            return Form.MISTRAL_7 if {SYSTEM, SYSTEM_END} <= self._named.keys() else Form.MISTRAL_2
        count, digest = MISTRAL_1
        if self.vocab_size < count:
            return Form.LLAMA_2
        texts = "".join(f"{self._model.id_to_piece(token)}\n" for token in range(count))
        same = hashlib.sha256(texts.encode()).hexdigest() == digest
        return Form.MISTRAL_1 if same else Form.LLAMA_2

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """What a form needs."""
        return Vocabulary(
            begin=self.bos,
            end=self.eos,
            adds_space=self._adds_space,
            named=self._named,
            encode=lambda text: self.encode(text, bos=False),
        )

    @cached_property
    def _named(self) -> dict[str, int]:
        """Text -> id of the pieces that are no ordinary text, control pieces and user-defined ones."""
        control = [token for token in range(self.vocab_size) if self._model.is_control(token)]
        defined = {
            text: self._model.piece_to_id(piece)
            for piece in self._defined
            if _TOKEN.fullmatch(text := piece.strip(SPACE))
        }
        return defined | {self._model.id_to_piece(token): token for token in control}

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the model puts a space in front of a text."""
        first = self._model.encode("a")[:1]
        return bool(first) and self._model.id_to_piece(first[0]).startswith(SPACE)
