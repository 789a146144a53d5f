"""Text <-> token ids by the library ``tokenizers``, and conversations by a chat template."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlxlora_core.api import DataError, Piece
from mlxlora_core.chat import Behind, ChatTemplate, Renderer, SpecialTexts, refuse_halves, template_warning
from mlxlora_tokenizers import library
from mlxlora_tokenizers.decoding import TokenTexts
from mlxlora_tokenizers.tokenizer_json import Document, prefixes_first_alone, without_prefix


@dataclass(frozen=True)
class Parts:
    """What a tokenizer is made of, once its files are read and checked.

    Attributes:
        where: the file, for messages.
        document: what the library was given.
        library: the library's tokenizer.
        texts: id -> what it adds to a text.
        vocab_size: the largest id and one.
        bos: id that begins a text, or None.
        eos: id that ends a whole text.
        stops: ids of which each ends a text.
        kept_apart: ids that no plain text has.
        special: how the special tokens are written.
        special_texts: how all tokens are written that were added to the vocabulary.
        template: of conversations, if there is one.
        form: what the conversations are, in words.
        fingerprint: of all this.
    """

    where: Path
    document: Document
    library: Tokenizer
    texts: TokenTexts
    vocab_size: int
    bos: int | None
    eos: int
    stops: frozenset[int]
    kept_apart: frozenset[int]
    special: SpecialTexts
    special_texts: frozenset[str]
    template: ChatTemplate | None
    form: str
    fingerprint: str


class LibraryTokenizer:
    """A tokenizer of the library ``tokenizers``; a :class:`mlxlora_core.api.Tokenizer`.

    Attributes:
        vocab_size: the largest id and one.
        bos: id that begins a text, or None where texts begin without one.
        stops: ids of which each ends a text.
        fingerprint: SHA-256 of what decides ids and conversations.
        chat_form: where the form of :meth:`render` comes from.
        chat_warning: what speaks against that form.
        special_texts: how the tokens are written that are no ordinary text.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.vocab_size, self.bos, self.stops = parts.vocab_size, parts.bos, parts.stops
        self.fingerprint, self.chat_form = parts.fingerprint, parts.form
        self.special_texts = parts.special_texts
        ids = {text: 0 for text in parts.special_texts if parts.special.is_one(text)}
        self.chat_warning = template_warning(parts.template, ids.get)

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of ``text``; the begin id, if there is one, in front and, if asked, the end id behind.

        Raises:
            DataError: half a surrogate pair.
            ModelError: the library fails at the text.
        """
        refuse_halves(text)
        front = [] if self.bos is None or not bos else [self.bos]
        return [*front, *self._plain(text, self._parts.library), *[self._parts.eos] * eos]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; a leading space is given back where the first token has one.

        Behind a begin id the space that :meth:`encode` puts in front of a text is
        taken away again.
        """
        text = b"".join(map(self._parts.texts.__getitem__, ids)).decode("utf-8", "replace")
        begins = self.bos is not None and self.bos in ids[:1]
        return text.removeprefix(" ") if begins and self._adds_space else text

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterator[str]:
        """The text of ``ids``, which follow others, in segments, one after every ``every`` ids.

        Bytes of a character that is not complete yet are held back, so that the
        segments joined are the text of all ids. No segment is empty.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        known, held = self._parts.texts, ""
        for count, token in enumerate(ids, start=1):
            held += decoder.decode(known[token])
            if held and count % every == 0:
                yield held
                held = ""
        held += decoder.decode(b"", final=True)
        if held:
            yield held

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[Piece]:
        """A conversation by the chat template.

        Raises:
            DataError: there is no template, it refuses the conversation, or half a surrogate pair.
        """
        template = self._parts.template
        if template is None:
            raise DataError(
                "the model has no chat template",
                where=self._parts.where,
                fix="train on rows of text or of prompt and completion, or put the chat_template.jinja "
                "of the model's chat version beside its tokenizer",
            )
        return Renderer(template, self._parts.special, self._part).render(messages, tools)

    def _part(self, text: str, behind: Behind) -> list[int]:
        """The ids of a part of a conversation."""
        if behind is Behind.TEXT:
            return self._plain(text, self._bare)
        return self._plain(text, self._parts.library if behind is Behind.NOTHING else self._behind_special)

    def _plain(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of a text, none of them of a special token.

        A vocabulary may have special tokens among its words too. Where one is found it
        is cut in two, until none is.
        """
        ids = library.ids(tokenizer, text, self._parts.where)
        apart = self._parts.kept_apart
        if apart.isdisjoint(ids):
            return ids
        places = library.places(tokenizer, text, self._parts.where)
        spans = [span for token, span in zip(ids, places, strict=True) if token in apart]
        cuts = [(start + stop) // 2 for start, stop in spans if stop - start > 1]
        if not cuts:  # characters of their own that are no text
            return [token for token in ids if token not in apart]
        edges = [0, *cuts, len(text)]
        ids = []
        for start, stop in pairwise(edges):
            ids += self._plain(text[start:stop], self._bare if start else tokenizer)
        return ids

    @cached_property
    def _adds_space(self) -> bool:
        """Whether a text gets a space in front that it does not have."""
        return any(self._begins_with_space(letter) for letter in "aA0.")

    def _begins_with_space(self, text: str) -> bool:
        ids = self._plain(text, self._parts.library)
        return bool(ids) and self._parts.texts[ids[0]].startswith(b" ")

    @cached_property
    def _bare(self) -> Tokenizer:
        """The tokenizer that puts no space in front of a text."""
        if not self._adds_space:
            return self._parts.library
        return library.load(json.dumps(without_prefix(self._parts.document)), self._parts.where)

    @cached_property
    def _behind_special(self) -> Tokenizer:
        """The tokenizer of what stands behind a special token."""
        first_alone = self._adds_space and prefixes_first_alone(self._parts.document)
        return self._bare if first_alone else self._parts.library
