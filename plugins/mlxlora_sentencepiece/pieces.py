"""The pieces of a SentencePiece model, and the tokens that other files add behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import sentencepiece

from mlxlora_core.api import ModelError
from mlxlora_core.chat import SpecialTexts, SpecialToken, TokenizerSettings
from mlxlora_core.files import file_bytes
from mlxlora_sentencepiece.sentencepiece_file import FILE_BYTES, check_model

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

# A second normalizer behind the first one is joined to it: no space in front of a text.
_NO_SPACE = b"\x1a\x02\x18\x00"


class Pieces:
    """A vocabulary.

    Args:
        source: the model file, or its contents.
        settings: what stands beside it.

    Attributes:
        path: the model file, or what it would be called.
        content: its bytes.
        defined: its user-defined pieces.
        model: that in C++.
        added: id -> token that another file adds.
        size: the largest id and one.
        spaced: whether a text behind a special token gets a space in front as one at the start does.

    Raises:
        ModelError: the file is absent or is no SentencePiece model, or a token that is added clashes.
    """

    def __init__(self, source: Path | bytes, settings: TokenizerSettings) -> None:
        self.path = source if isinstance(source, Path) else Path("tokenizer.model")
        if isinstance(source, Path) and not source.exists():
            raise ModelError(
                "there is no tokenizer", where=source, fix="put the checkpoint's tokenizer.model there"
            )
        self.content = file_bytes(source, FILE_BYTES, self.path)
        self.defined = check_model(self.content, self.path)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=self.content)
            self.model.encode(SPACE)  # faults of the unknown piece and of normalisation show here
        except (RuntimeError, ValueError) as fault:
            raise ModelError(f"is not a SentencePiece model: {fault}", where=self.path) from fault
        self._count: int = self.model.vocab_size()
        self.spaced = settings.spaced
        self.added: dict[int, SpecialToken] = {}
        self._ids: dict[str, int] = {}
        self._named: set[int] = set()
        self._add(settings)
        self.size = max([self._count, *(number + 1 for number in self.added)])

    def _add(self, settings: TokenizerSettings) -> None:
        """Take the tokens of another file, which may repeat pieces and say more of them."""
        for token in settings.added:
            number, content = token["id"], token["content"]
            known = self.text(number)
            if known not in (None, content) or self.id(content) not in (None, number):
                raise ModelError(
                    f"the token {content!r:.80} has the id {number}; {self.path.name} says another",
                    where=settings.added_place,
                    fix="take all files of the tokenizer from one model",
                )
            if token["special"] and number != self.model.unk_id():
                self._named.add(number)
            if known is None:
                flags = {flag: token[flag] for flag in ("lstrip", "rstrip", "single_word")}
                self.added[number] = SpecialToken(number, content, **flags)
                self._ids[content] = number

    def id(self, text: str) -> int | None:
        """The id of a piece or token that is written so, or None."""
        if text in self._ids:
            return self._ids[text]
        number: int = self.model.piece_to_id(text)
        return number if self.model.id_to_piece(number) == text else None

    def text(self, number: int) -> str | None:
        """How a piece or token is written, or None where the id has none."""
        if 0 <= number < self._count:
            piece: str = self.model.id_to_piece(number)
            return piece
        return self.added[number].content if number in self.added else None

    def is_control(self, number: int) -> bool:
        """Whether it is a control piece, which is in no text, or a token that is said to be special."""
        return number in self._named or (number < self._count and bool(self.model.is_control(number)))

    def control(self) -> list[int]:
        """The ids of those."""
        return [number for number in (*range(self._count), *self.added) if self.is_control(number)]

    def added_bytes(self, number: int) -> bytes:
        """What an id that is no control piece adds to a text."""
        if number >= self._count:
            return (self.text(number) or "").encode()
        piece: str = self.model.id_to_piece(number)
        if self.model.is_byte(number):
            return bytes([int(piece[3:-1], 16)])  # <0xE2>
        if self.model.is_unknown(number):
            piece = self.model.decode([number])
        return piece.replace(SPACE, " ").encode()

    def special_texts(self, numbers: Iterable[int]) -> SpecialTexts:
        """How some of them are written."""
        written = ((number, self.text(number)) for number in numbers)
        plain = (SpecialToken(number, text) for number, text in written if text is not None)
        return SpecialTexts(self.added.get(token.id, token) for token in plain)

    def encoder(self, silent: Iterable[int]) -> Callable[[str, bool], list[int]]:
        """A function from a text, and whether it gets a space in front, to ids.

        Tokens that were added and are text are found in it. What is written as one of
        the ids that are no text is letters: SentencePiece finds no control piece in a
        text, but it would find others.
        """
        apart = set(silent)
        words = self.special_texts(number for number in self.added if number not in apart)
        letters = self.special_texts(
            number for number in apart if number < self._count and not self.model.is_control(number)
        )

        def encode(text: str, begins: bool) -> list[int]:
            ids: list[int] = []
            for part in words.parts(text):
                if isinstance(part, int):
                    ids.append(part)
                    begins = self.spaced
                    continue
                for piece in letters.cut(part):
                    ids += (self.model if begins else self._bare).encode(piece)
                    begins = False
            return ids

        return encode

    @cached_property
    def adds_space(self) -> bool:
        """Whether the model puts a space in front of a text."""
        first = self.model.encode("a")[:1]
        return bool(first) and self.model.id_to_piece(first[0]).startswith(SPACE)

    @cached_property
    def _bare(self) -> sentencepiece.SentencePieceProcessor:
        """The model that puts none there."""
        if not self.adds_space:
            return self.model
        return sentencepiece.SentencePieceProcessor(model_proto=self.content + _NO_SPACE)
