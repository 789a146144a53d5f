"""Rows -> examples: token ids and their mask, built together by one function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora_core.errors import DataError
from mlxlora_core.files.jsonl import FAULTS_TOLD, JsonLines, check_content, read_jsonl, refuse_faults
from mlxlora_core.model.tokenizer import Tokenizer
from mlxlora_core.training.chat import turns

Piece = tuple[list[int], bool]  # ids of a row, and whether they count in the loss


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
    """

    examples: tuple[Example, ...]
    cut: int = 0
    cut_tokens: int = 0
    empty: int = 0
    lengths: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """All tokens, padding not among them."""
        return sum(len(example.tokens) for example in self.examples)


def read_examples(
    path: Path, tokenizer: Tokenizer, *, max_seq_length: int, mask_prompt: bool = False
) -> Examples:
    """Read and tokenize one split.

    Args:
        path: a ``.jsonl`` file.
        tokenizer: turns text into ids.
        max_seq_length: longer rows are cut, and counted.
        mask_prompt: whether only completions and answers count in the loss.

    Raises:
        DataError: the file is absent, malformed (every bad line as file:line),
            or has no row that can be used.
    """
    rows = ((f"{path}:{line}", content) for line, content in read_jsonl(path))
    return make_examples(rows, path, tokenizer, max_seq_length=max_seq_length, mask_prompt=mask_prompt)


def examples_in_memory(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    mask_prompt: bool = False,
) -> Examples:
    """Tokenize rows that stand in no file; see :func:`read_examples`.

    Args:
        rows: of the shapes that a line of a ``.jsonl`` file may have.
        name: what errors call them.
        tokenizer: turns text into ids.
        max_seq_length: longer rows are cut, and counted.
        mask_prompt: whether only completions and answers count in the loss.

    Raises:
        DataError: no row, one of another shape (the first are told, with the count
            of all), or none that can be used.
    """
    if not rows:
        raise DataError("there is no row", where=f"{name} rows")
    found = {f"{name} row {i}": check_content(row) for i, row in enumerate(rows, start=1)}
    faults = [f"{place}: {fault}" for place, fault in found.items() if fault]
    refuse_faults([JsonLines([], 0, faults[:FAULTS_TOLD], len(faults))])
    placed = zip(found, rows, strict=True)
    return make_examples(
        placed, f"{name} rows", tokenizer, max_seq_length=max_seq_length, mask_prompt=mask_prompt
    )


def make_examples(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    where: Path | str,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    mask_prompt: bool,
) -> Examples:
    """Examples of rows, each with the place that an error names.

    Raises:
        DataError: a row that cannot be tokenized, or none that can be used.
    """
    examples, lengths, cut, cut_tokens, empty = [], [], 0, 0, 0
    for place, content in rows:
        try:
            whole = _example(_pieces(content, tokenizer, mask_prompt), tokenizer.bos)
        except DataError as fault:
            raise DataError(fault.what, where=place, fix=fault.fix) from fault
        example = Example(whole.tokens[:max_seq_length], whole.mask[:max_seq_length])
        if len(whole.tokens) > max_seq_length:
            cut, cut_tokens = cut + 1, cut_tokens + len(whole.tokens) - max_seq_length
        says_something = ((whole.tokens != tokenizer.bos) & (whole.tokens != tokenizer.eos)).any()
        if says_something and example.mask.any():
            examples.append(example)
            lengths.append(len(whole.tokens))
        else:
            empty += 1
    if not examples:
        raise DataError(f"none of {empty} rows has a token that counts in the loss", where=where)
    return Examples(tuple(examples), cut, cut_tokens, empty, tuple(lengths))


def _example(pieces: Iterable[Piece], bos: int) -> Example:
    """Ids and mask of a row, built together; a begin token never counts, since nothing foretells it."""
    parts = [(np.array(ids, np.uint32), counts) for ids, counts in pieces]
    tokens = np.concatenate([ids for ids, _ in parts])
    mask = np.concatenate([(ids != bos) & counts for ids, counts in parts])
    return Example(tokens, mask)


def _pieces(content: Mapping[str, Any], tokenizer: Tokenizer, mask_prompt: bool) -> Iterator[Piece]:
    """The pieces of one row."""
    if "text" in content:
        if mask_prompt:
            raise DataError(
                "a {text} row has no prompt to mask",
                fix="leave --mask-prompt out, or use {prompt, completion} or {messages} rows",
            )
        yield tokenizer.encode(content["text"], eos=True), True
        return
    pairs = (
        [(content["prompt"], content["completion"])] if "prompt" in content else turns(content["messages"])
    )
    for prompt, answer in pairs:
        asked, answered = _turn(prompt, answer, tokenizer)
        yield asked, not mask_prompt
        yield answered, True


def _turn(prompt: str, answer: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of a prompt, begin token in front, and of what follows it, end token behind.

    Both are encoded as one text, as they would be read; the answer begins where
    that text stops agreeing with the prompt alone.
    """
    alone = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + answer, eos=True)
    same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    return whole[:same], whole[same:]
