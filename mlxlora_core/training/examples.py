"""Rows -> examples: token ids and their mask, built together by one function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora_core.errors import DataError, listing
from mlxlora_core.model.tokenizers import CheckedTokenizer

LONG_ROW_TOKENS = 2048  # a row longer than that is told


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
        cut: how many were cut at the longest length.
        cut_tokens: tokens lost by cutting.
        empty: rows left out, since no token of theirs counts.
        lengths: tokens of each example before it was cut.
        notes: what there is to tell of the rows that they are made of.
        limit: tokens that an example may have.
        limited_by: what decides that, in words.
    """

    examples: tuple[Example, ...]
    cut: int = 0
    cut_tokens: int = 0
    empty: int = 0
    lengths: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    limit: int = 0
    limited_by: str = ""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """All tokens, padding not among them."""
        return sum(len(example.tokens) for example in self.examples)

    def words(self, split: str) -> Iterator[str]:
        """A line on all that somebody should know of the rows, which are those of ``split``."""
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


def make_examples(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    where: Path | str,
    tokenizer: CheckedTokenizer,
    *,
    max_seq_length: int,
    mask_prompt: bool,
) -> Examples:
    """Examples of rows, each with the place that an error names.

    Args:
        rows: (place, content) of each, of a plain shape.
        where: what they are called together.
        tokenizer: turns text into ids.
        max_seq_length: longer rows are cut, and counted.
        mask_prompt: whether only completions and answers count in the loss.

    Raises:
        DataError: a row that cannot be tokenized, or none that can be used.
    """
    examples, lengths, cut, cut_tokens, empty = [], [], 0, 0, 0
    refused: dict[tuple[str, str], list[str]] = {}
    specials = list(tokenizer.specials)
    for place, content in rows:
        try:
            whole = _example(_pieces(content, tokenizer, mask_prompt), tokenizer.bos)
        except DataError as fault:
            refused.setdefault((fault.what, fault.fix), []).append(place)
            continue
        example = Example(whole.tokens[:max_seq_length], whole.mask[:max_seq_length])
        if len(whole.tokens) > max_seq_length:
            cut, cut_tokens = cut + 1, cut_tokens + len(whole.tokens) - max_seq_length
        says_something = not np.isin(whole.tokens, specials).all()
        if says_something and example.mask.any():
            examples.append(example)
            lengths.append(len(whole.tokens))
        else:
            empty += 1
    if refused:
        raise _refusal(refused)
    if not examples:
        raise DataError(f"none of {empty} rows has a token that counts in the loss", where=where)
    return Examples(tuple(examples), cut, cut_tokens, empty, tuple(lengths), limit=max_seq_length)


def _refusal(refused: Mapping[tuple[str, str], Sequence[str]]) -> DataError:
    """The error for (fault, fix) -> the places of rows that cannot be tokenized."""
    words = [
        f"{places[0]}: {what}" + (f" ({len(places)} rows: {listing(places, 3)})" if places[1:] else "")
        for (what, _), places in refused.items()
    ]
    fix = next((fix for _, fix in refused if fix), "")
    return DataError(listing(words, 3), fix=fix)


def _example(pieces: Iterable[tuple[Sequence[int], bool]], bos: int | None) -> Example:
    """Ids and mask of a row, built together out of pieces and whether each counts.

    A begin token never counts, and neither does the first token: nothing foretells them.
    """
    parts = [(np.array(ids, np.uint32), counts) for ids, counts in pieces]
    tokens = np.concatenate([ids for ids, _ in parts])
    mask = np.concatenate([np.full(len(ids), counts) for ids, counts in parts])
    if bos is not None:
        mask &= tokens != bos
    mask[:1] = False
    return Example(tokens, mask)


def _pieces(
    content: Mapping[str, Any], tokenizer: CheckedTokenizer, mask_prompt: bool
) -> Iterator[tuple[Sequence[int], bool]]:
    """The ids of one row in pieces, and whether each counts in the loss."""
    if "text" in content:
        if mask_prompt:
            raise DataError(
                "a {text} row has no prompt to mask",
                fix="leave --mask-prompt out, or use {prompt, completion} or {messages} rows",
            )
        yield tokenizer.encode(content["text"], eos=True), True
    elif "prompt" in content:
        asked, answered = _turn(content["prompt"], content["completion"], tokenizer)
        yield asked, not mask_prompt
        yield answered, True
    else:
        pieces = tokenizer.render(content["messages"])
        if not pieces[-1].answer:
            raise DataError("messages must end with an answer of the assistant")
        for piece in pieces:
            yield piece.ids, piece.answer or not mask_prompt


def _turn(prompt: str, answer: str, tokenizer: CheckedTokenizer) -> tuple[list[int], list[int]]:
    """The ids of a prompt, begin token in front, and of what follows it, end token behind.

    Both are encoded as one text, as they would be read; the answer begins where
    that text stops agreeing with the prompt alone.
    """
    alone = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + answer, eos=True)
    same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    return whole[:same], whole[same:]
