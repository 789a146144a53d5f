"""Rows -> examples: token ids and their mask, built together by one function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora_core.errors import DataError, listing
from mlxlora_core.model.loading import Model
from mlxlora_core.model.prompts import continued, is_taken, prompt_ids, reads_as
from mlxlora_core.model.special_texts import special_texts
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.training.findings import Finding, Findings, counted, look, texts
from mlxlora_core.training.settings import BatchConfig
from mlxlora_core.training.sources import SplitRows
from mlxlora_core.values import Piece

LONG_ROW_TOKENS = 2048  # a split with a longer row than that gets a warning


@dataclass(frozen=True)
class Example:
    """One tokenized row.

    Attributes:
        tokens: ids, (T,) uint32.
        mask: whether each token counts in the loss as a target, (T,) bool; the
            first never does, since nothing predicts it.
    """

    tokens: np.ndarray[Any, Any]
    mask: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Attributes:
        examples: those that can be trained on, in file order.
        cut: how many were cut at ``limit``.
        cut_tokens: how many tokens that lost.
        empty: how many rows were left out because none of their tokens counts.
        lengths: tokens of each example before it was cut.
        findings: what the user should know about the rows.
        conversations: how many of the rows are conversations.
        chat_form: the chat format that these were put into, in words.
        chat_warning: why that format may be wrong, or nothing.
        notes: what the user should know about how the rows were read.
        limit: the most tokens that an example may have.
        limited_by: what sets that limit, in words.
    """

    examples: tuple[Example, ...]
    cut: int = 0
    cut_tokens: int = 0
    empty: int = 0
    lengths: tuple[int, ...] = ()
    findings: Findings = field(default_factory=Findings)
    conversations: int = 0
    chat_form: str = ""
    chat_warning: str = ""
    notes: tuple[str, ...] = ()
    limit: int = 0
    limited_by: str = ""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """The number of tokens, without padding."""
        return sum(len(example.tokens) for example in self.examples)

    def words(self, split: str) -> Iterator[str]:
        """A line for each thing that the user should know about the rows; ``split`` names them."""
        yield from self.notes
        longest = max(len(example.tokens) for example in self.examples)
        if longest > LONG_ROW_TOKENS:
            yield f"warning: {split} has rows of up to {longest} tokens; long rows take much memory"
        if self.cut:
            share = self.cut_tokens / (self.tokens + self.cut_tokens)
            limit = f"{self.limit} tokens{f' ({self.limited_by})' if self.limited_by else ''}"
            yield f"warning: {self.cut} {split} rows were cut at {limit}, {share:.1%} of all tokens are lost"
        if self.empty:
            yield f"warning: {self.empty} {split} rows have no token that counts and were left out"
        yield from self.findings.sentences(split)
        if self.conversations and self.chat_form:
            warning, though = (
                ("warning: ", f", though {self.chat_warning}") if self.chat_warning else ("", "")
            )
            yield f"{warning}{counted(self.conversations, split)} of messages in {self.chat_form}{though}"


#: the rows of a split: read, or tokenized already
Source = SplitRows | Examples


def examples_of(source: Source, model: Model, config: BatchConfig) -> Examples:
    """The examples of a split, tokenized unless they already are.

    Args:
        source: its rows.
        model: gives the tokenizer and the longest context.
        config: how rows are cut and masked.

    Raises:
        DataError: rows that cannot be tokenized, or none that can be used.
    """
    if isinstance(source, Examples):
        return source
    examples = make_examples(
        source.rows,
        source.name,
        model.tokenizer,
        max_seq_length=model.sequence_limit(config.max_seq_length),
        mask_prompt=config.mask_prompt,
    )
    by_context = model.sequence_limit(config.max_seq_length) < config.max_seq_length
    limited_by = "the context of the model" if by_context else "max_seq_length"
    return replace(examples, notes=source.notes, limited_by=limited_by)


def make_examples(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    where: Path | str,
    tokenizer: CheckedTokenizer,
    *,
    max_seq_length: int,
    mask_prompt: bool,
) -> Examples:
    """The examples of some rows.

    Args:
        rows: (place, content) of each, in a plain shape; errors name the place.
        where: what errors call all of them.
        tokenizer: turns text into ids.
        max_seq_length: longer rows are cut, and counted.
        mask_prompt: whether only completions and answers count in the loss.

    Raises:
        DataError: a row that cannot be tokenized, or none that can be used.
    """
    reader = _RowReader(tokenizer, mask_prompt)
    examples, lengths, cut, cut_tokens, empty = [], [], 0, 0, 0
    refused: dict[tuple[str, str], list[str]] = {}
    specials = list(tokenizer.specials)
    for place, content in rows:
        try:
            whole = reader.read(content)
        except DataError as fault:
            what = f"{fault.what} ({fault.where})" if fault.where else fault.what
            refused.setdefault((what, fault.fix), []).append(place)
            continue
        example = Example(whole.tokens[:max_seq_length], whole.mask[:max_seq_length])
        if len(whole.tokens) > max_seq_length:
            cut, cut_tokens = cut + 1, cut_tokens + len(whole.tokens) - max_seq_length
        says_something = not np.isin(whole.tokens, specials).all()
        if says_something and example.mask.any():
            examples.append(example)
            lengths.append(len(whole.tokens))
            reader.tell(place)
        else:
            empty += 1
    if refused:
        raise _refusal(refused)
    if not examples:
        raise DataError(f"none of {empty} rows has a token that counts in the loss", where=where)
    return Examples(
        tuple(examples),
        cut,
        cut_tokens,
        empty,
        tuple(lengths),
        reader.findings,
        reader.conversations,
        tokenizer.chat_form,
        tokenizer.chat_warning,
        limit=max_seq_length,
    )


def _refusal(refused: Mapping[tuple[str, str], Sequence[str]]) -> DataError:
    """The error for rows that cannot be tokenized, given (fault, fix) -> their places."""
    words = [
        f"{places[0]}: {what}" + (f" ({len(places)} rows: {listing(places, 3)})" if places[1:] else "")
        for (what, _), places in refused.items()
    ]
    fix = next((fix for _, fix in refused if fix), "")
    return DataError(listing(words, 3), fix=fix)


class _RowReader:
    """Turns rows into ids, one after the other, and collects findings about them.

    Attributes:
        findings: about the rows that :meth:`tell` was called for.
        conversations: how many of those are conversations.
    """

    def __init__(self, tokenizer: CheckedTokenizer, mask_prompt: bool) -> None:
        self.findings, self.conversations = Findings(), 0
        self._tokenizer, self._mask_prompt = tokenizer, mask_prompt
        self._content: Mapping[str, Any] = {}  # the row read last
        self._pieces: list[Piece] = []  # its ids
        self._found: list[Finding] = []  # what was found while reading it
        self._taken: dict[str, bool] = {}  # special text -> whether it becomes the token of that name

    def read(self, content: Mapping[str, Any]) -> Example:
        """The ids of a row, and which of them count in the loss.

        Raises:
            DataError: a row that cannot be tokenized.
        """
        self._content, self._found = content, []
        if "text" in content:
            self._pieces = self._text(content["text"])
        elif "prompt" in content:
            self._pieces = self._completed(content["prompt"], content["completion"])
        else:
            self._pieces = self._conversation(content["messages"], content.get("tools", ()))
        parts = ((piece.ids, piece.answer or not self._mask_prompt) for piece in self._pieces)
        return _example(parts, self._tokenizer.bos)

    def tell(self, place: str) -> None:
        """Collect findings about the row read last, which stands at ``place``."""
        content = self._content
        self.conversations += "messages" in content
        found, whole = [*look(content), *self._found], self._comes_back()
        if not whole and self._comes_back(str.strip):
            whole = True
            found = [Finding.CUT_EDGES if finding is Finding.EDGES else finding for finding in found]
        for finding in [*found, *([] if whole else [Finding.CHANGED])]:
            self.findings.add(finding, place)
        known = self._tokenizer.special_texts
        special = {name for text in texts(content) for name in special_texts(text, known)}
        for finding, taken in ((Finding.SPECIAL, False), (Finding.TAKEN, True)):
            if names := sorted(text for text in special if self._is_taken(text) is taken):
                self.findings.add(finding, place, names)

    def _text(self, text: str) -> list[Piece]:
        if self._mask_prompt:
            raise DataError(
                "a {text} row has no prompt to mask",
                fix="leave --mask-prompt out, or use {prompt, completion} or {messages} rows",
            )
        return [Piece(tuple(self._tokenizer.encode(text, eos=True)), True)]

    def _completed(self, prompt: str, completion: str) -> list[Piece]:
        row = continued(self._tokenizer, prompt, completion)
        if row.apart:
            self._found.append(Finding.APART)
        return [Piece(tuple(row.asked), False), Piece(tuple(row.answered), True)]

    def _conversation(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[Piece]:
        pieces = self._tokenizer.render(messages, tools)
        if not pieces[-1].answer:
            raise DataError("messages must end with an answer of the assistant")
        if not self._is_asked_so(messages[:-1], tools, pieces[:-1]):
            self._found.append(Finding.ASKED_OTHERWISE)
        return pieces

    def _is_asked_so(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], pieces: Sequence[Piece]
    ) -> bool:
        """Whether a prompt of the messages before the last answer has the ids that come before it here."""
        try:
            ids = prompt_ids(self._tokenizer, messages, tools) if messages else []
        except DataError:  # the template refuses such a prompt
            return False
        return ids == [token for piece in pieces for token in piece.ids]

    def _comes_back(self, seen: Callable[[str], str] = str) -> bool:
        """Whether the decoded ids contain all texts of the row, each after ``seen`` was applied to it."""
        if "messages" not in self._content:
            ids = [token for piece in self._pieces for token in piece.ids]
            return reads_as(self._tokenizer, ids, "".join(texts(self._content)))
        whole, at = "".join(self._tokenizer.decode(piece.ids) for piece in self._pieces), 0
        for text in map(seen, texts(self._content)):
            at = whole.find(text, at)
            if at < 0:
                return False
            at += len(text)
        return True

    def _is_taken(self, text: str) -> bool:
        """As :func:`is_taken`, asked once for each text."""
        if text not in self._taken:
            self._taken[text] = is_taken(self._tokenizer, text)
        return self._taken[text]


def _example(pieces: Iterable[tuple[Sequence[int], bool]], bos: int | None) -> Example:
    """Ids and mask of a row, built together from pieces and whether each of them counts.

    A begin-of-text token never counts, nor does the first token, which nothing predicts.
    """
    parts = [(np.array(ids, np.uint32), counts) for ids, counts in pieces]
    tokens = np.concatenate([ids for ids, _ in parts])
    mask = np.concatenate([np.full(len(ids), counts) for ids, counts in parts])
    if bos is not None:
        mask &= tokens != bos
    mask[:1] = False
    return Example(tokens, mask)
