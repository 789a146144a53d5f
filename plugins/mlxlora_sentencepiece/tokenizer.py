"""SentencePiece text <-> token ids."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxlora_core.api import DataError, ModelError, Piece, listing
from mlxlora_core.chat import (
    Behind,
    ChatTemplate,
    Renderer,
    TokenizerSettings,
    refuse_halves,
    template_warning,
    turn_end_ids,
)
from mlxlora_sentencepiece.chat import ASK, ASKED, SYSTEM, SYSTEM_END, Form, Vocabulary, pieces
from mlxlora_sentencepiece.pieces import SPACE, Pieces

#: how many pieces Mistral's first vocabulary has, and the SHA-256 of their texts, a line feed behind each
MISTRAL_1 = (32000, "35c28c8df590b200c16cf9ec7a4573b3230fed9cde1bbd8d9ea57e1c4ba796fd")

# Pieces in which other families write conversations.
_OTHER_FORMS = ("<start_of_turn>", "<|im_start|>", "<|user|>", "<|start_header_id|>", "<|User|>")
_TOKEN = re.compile(r"[<\[].+[>\]]")  # how pieces are spelt that stand for something else than text


class SentencePieceTokenizer:
    """A SentencePiece model; a :class:`mlxlora_core.api.Tokenizer`.

    Args:
        source: the model file, or its contents.
        settings: what the files beside it say.
        template: of conversations, where those files have one.

    Attributes:
        path: the model file, or what it would be called.
        vocab_size: the largest id and one.
        bos: id that begins a text, or None where the files say that texts begin without one.
        eos: id that ends one.
        stops: that id, and others by which the files end texts and turns.
        fingerprint: SHA-256 of the file, and of what others add to it.

    Raises:
        ModelError: the file is absent or is no SentencePiece model, it has no
            begin or end piece, or another file does not go with it.
        SafetyError: the template reaches for what it must not.
    """

    def __init__(
        self,
        source: Path | bytes,
        settings: TokenizerSettings | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        settings = settings or TokenizerSettings()
        self._pieces, self._template = Pieces(source, settings), template
        self.path, self.vocab_size = self._pieces.path, self._pieces.size
        self.bos, self.eos = self._begin(settings), self._end(settings)
        self.stops = frozenset([self.eos, *self._stops(settings)])
        ends = self.stops if self.bos is None else self.stops | {self.bos}
        self._silent = ends | frozenset(self._pieces.control())
        self._encode = self._pieces.encoder(self._silent)
        self._texts: dict[int, bytes] = {}  # id -> what it adds to a text
        told = [sorted(vars(token).items()) for token in self._pieces.added.values()]
        more = [told, settings.spaced, self.bos, sorted(self.stops), template.fingerprint if template else ""]
        model = self._pieces.model
        plain = more == [[], True, model.bos_id(), [model.eos_id()], ""]
        added = b"" if plain else json.dumps(more).encode()
        self.fingerprint = hashlib.sha256(self._pieces.content + added).hexdigest()

    def _begin(self, settings: TokenizerSettings) -> int | None:
        """The id that begins a text."""
        if settings.adds_bos is False:
            return None
        return self._named_id(settings.bos, self._pieces.model.bos_id(), "begin", settings)

    def _end(self, settings: TokenizerSettings) -> int:
        """The id that ends a text."""
        return self._named_id(settings.eos, self._pieces.model.eos_id(), "end", settings)

    def _named_id(self, text: str | None, own: int, what: str, settings: TokenizerSettings) -> int:
        """The id of a token that another file names, or else the model's own."""
        found = own if text is None else self._pieces.id(text)
        if found is None:
            raise ModelError(
                f"names the {what} token {text!r:.80}, which {self.path.name} does not have",
                where=settings.config_place,
                fix="take all files of the tokenizer from one model",
            )
        if found < 0:
            raise ModelError("the tokenizer has no begin or no end piece", where=self.path)
        return found

    def _stops(self, settings: TokenizerSettings) -> Iterator[int]:
        """Further ids that end texts: of generation_config.json, and of the template's end of a turn."""
        for token in settings.stops:
            if token >= self.vocab_size:
                raise ModelError(
                    f"eos_token_id {token} is beyond the vocabulary of {self.vocab_size} tokens",
                    where=settings.stops_place,
                    fix="take all files of the model from one place",
                )
            yield token
        yield from turn_end_ids(self._template, self._pieces.id)

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of ``text``, with the begin id in front and, if asked, the end id behind.

        Raises:
            DataError: half a surrogate pair, which no tokenizer has a token for.
        """
        refuse_halves(text)
        front = [] if self.bos is None or not bos else [self.bos]
        return [*front, *self._encode(text, True), *[self.eos] * eos]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; a leading space is given back where the first piece has one.

        Behind a begin id the space that :meth:`encode` puts in front of a text is
        taken away again, so that a text comes back as it was.
        """
        text = b"".join(map(self._bytes, ids)).decode("utf-8", "replace")
        begins = self.bos is not None and self.bos in ids[:1]
        return text.removeprefix(" ") if begins and self._pieces.adds_space else text

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

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[Piece]:
        """A conversation by the template of its files, or in the form that goes with the vocabulary.

        Raises:
            DataError: a conversation that it cannot say, or half a surrogate pair.
        """
        if self._template is not None:
            return Renderer(self._template, self._special, self._part).render(messages, tools)
        if tools:
            raise DataError(f"{self.chat_form} has no tools", where=self.path)
        return pieces(self._form, messages, self._vocabulary)

    def _part(self, text: str, behind: Behind) -> list[int]:
        """The ids of a part of a conversation."""
        spaced = self._pieces.spaced if behind is Behind.SPECIAL else behind is Behind.NOTHING
        return self._encode(text, spaced)

    @property
    def chat_form(self) -> str:
        """The form of :meth:`render` in words."""
        return "the template of its files" if self._template else self._form.value

    @property
    def chat_warning(self) -> str:
        """What speaks against that form, or nothing."""
        if self._template:
            return template_warning(self._template, self._pieces.id)
        others = [piece for piece in _OTHER_FORMS if piece in self._named]
        return f"the vocabulary has {listing(others)} for another form" if others else ""

    @property
    def special_texts(self) -> frozenset[str]:
        """How the pieces are written that are no ordinary text."""
        model = self._pieces.model
        added = (token.content for token in self._pieces.added.values())
        return frozenset({*self._named, *added, model.id_to_piece(model.unk_id())})

    def _bytes(self, token: int) -> bytes:
        """What one id adds to a text; one beyond the vocabulary, which a padded model has, adds nothing."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = b"" if token in self._silent else self._pieces.added_bytes(token)
        return known

    @cached_property
    def _special(self) -> Any:
        """How the ids that are no text are written."""
        return self._pieces.special_texts(sorted(self._silent))

    @cached_property
    def _form(self) -> Form:
        """The form of conversations that goes with the vocabulary."""
        if {ASK, ASKED} <= self._named.keys():
            return Form.MISTRAL_7 if {SYSTEM, SYSTEM_END} <= self._named.keys() else Form.MISTRAL_2
        count, digest = MISTRAL_1
        if self._pieces.model.vocab_size() < count:
            return Form.LLAMA_2
        texts = "".join(f"{self._pieces.text(token)}\n" for token in range(count))
        same = hashlib.sha256(texts.encode()).hexdigest() == digest
        return Form.MISTRAL_1 if same else Form.LLAMA_2

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """What a form needs."""
        begin = self._pieces.model.bos_id() if self.bos is None else self.bos
        return Vocabulary(
            begin=begin,
            end=self.eos,
            adds_space=self._pieces.adds_space,
            named=self._named,
            encode=lambda text: self.encode(text, bos=False),
        )

    @cached_property
    def _named(self) -> dict[str, int]:
        """Text -> id of the pieces that are no ordinary text, control pieces and user-defined ones."""
        defined = {
            text: self._pieces.model.piece_to_id(piece)
            for piece in self._pieces.defined
            if _TOKEN.fullmatch(text := piece.strip(SPACE))
        }
        return defined | {str(self._pieces.text(token)): token for token in self._pieces.control()}
