"""Rows -> examples -> batches, and the dataset folder they are kept in.

Token ids and their mask are built together by one function, the shift by one
token happens in one line, and the order of batches is a function of (seed,
epoch) alone, so that a place in training is one integer.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import mlx.core as mx
import numpy as np

from mlxlora_core import durable
from mlxlora_core.errors import DataError, some
from mlxlora_core.jsonl import read_jsonl
from mlxlora_core.options import plain
from mlxlora_core.specs import DatasetOptions, Row, Rows
from mlxlora_core.tokenizer import Tokenizer

T = TypeVar("T")

SPLITS = ("train", "valid", "test")
RECORD = "dataset.json"


# --- the dataset folder -------------------------------------------------------


def write_dataset(
    rows: Rows, folder: Path, options: DatasetOptions, made_by: Mapping[str, Any]
) -> dict[str, Any]:
    """Dedupe and split ``rows`` into ``train.jsonl``, ``valid.jsonl``, ``test.jsonl`` and ``dataset.json``.

    Args:
        rows: what a builder made.
        folder: where the files go.
        options: of the builder; they say how to split.
        made_by: builder and options, for the record.

    Returns:
        The record, as ``dataset.json`` holds it.

    Raises:
        DataError: no rows, or none left to train on.
    """
    kept, repeated = _without_repeats(rows.rows)
    if not kept:
        raise DataError(f"no rows were made ({some(f'{s.source}: {s.reason}' for s in rows.skipped)})")
    by_split = _split(kept, options)
    if not by_split["train"]:
        raise DataError(f"none of {len(kept)} rows is left to train on", fix="lower test_set_size")
    for name in SPLITS:
        durable.write_file(folder / f"{name}.jsonl", partial(_write_rows, by_split[name], options))
    record = {
        "rows": {name: len(by_split[name]) for name in SPLITS},
        "groups": len({_group(row) for row in kept}),
        "repeated_rows": repeated,
        "rows_in_two_splits": _overlap(by_split),
        "versions": dict(rows.versions),
        **plain(made_by),
        "skipped": [{"source": s.source, "reason": s.reason} for s in rows.skipped],
    }
    durable.write_json(folder / RECORD, record)
    return record


def _write_rows(rows: Sequence[Row], options: DatasetOptions, file: BinaryIO) -> None:
    for part in _parts(rows, options.write_batch_size):
        lines = [json.dumps(dict(row.content), ensure_ascii=False) + "\n" for row in part]
        file.write("".join(lines).encode())


def _without_repeats(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows with each content once a split, and how many were left out."""
    unique: dict[tuple[str | None, str], Row] = {}
    for row in rows:
        unique.setdefault((row.split, _bytes(row).decode()), row)
    return list(unique.values()), len(rows) - len(unique)


def _split(rows: Sequence[Row], options: DatasetOptions) -> dict[str, list[Row]]:
    """Rows by split: as the source has settled it, else by groups held out at random.

    Groups are drawn by a hash of (seed, group), so that adding a source moves
    no other row from one split to another more than the shares demand.
    """
    if any(row.split for row in rows):
        return {name: [row for row in rows if (row.split or "train") == name] for name in SPLITS}
    groups = sorted({_group(row) for row in rows}, key=lambda g: _draw(options.split_seed, g))
    held_out = round(len(groups) * options.test_set_size)
    valid = set(groups[: (held_out + 1) // 2])
    test = set(groups[(held_out + 1) // 2 : held_out])
    split: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        group = _group(row)
        split["valid" if group in valid else "test" if group in test else "train"].append(row)
    return split


def _overlap(by_split: Mapping[str, Sequence[Row]]) -> int:
    """How many contents stand in more than one split."""
    counts = Counter(chain.from_iterable({_bytes(row) for row in rows} for rows in by_split.values()))
    return sum(count > 1 for count in counts.values())


def _bytes(row: Row) -> bytes:
    return json.dumps(dict(row.content), sort_keys=True).encode()


def _group(row: Row) -> bytes:
    return row.group.encode("utf-8", "surrogatepass") or _bytes(row)


def _draw(seed: int, group: bytes) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + group).digest()


# --- examples -----------------------------------------------------------------


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
    """

    examples: tuple[Example, ...]
    cut: int = 0
    cut_tokens: int = 0
    empty: int = 0

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
    pieces = []
    for line, content in read_jsonl(path):
        if mask_prompt and "text" in content:
            raise DataError(
                "a {text} row has no prompt to mask",
                where=f"{path}:{line}",
                fix="leave --mask-prompt out, or use {prompt, completion} or {messages} rows",
            )
        pieces.append(_tokens(content, tokenizer, f"{path}:{line}"))
    return _examples(pieces, path, max_seq_length, mask_prompt)


def _examples(
    rows: Sequence[list[tuple[list[int], bool]]], path: Path, max_seq_length: int, mask_prompt: bool
) -> Examples:
    """Join the pieces of each row, cut what is too long and leave out what cannot count."""
    examples, cut, cut_tokens, empty = [], 0, 0, 0
    for row in rows:
        example = _join(row, mask_prompt)
        over = len(example.tokens) - max_seq_length
        if over > 0:
            cut, cut_tokens = cut + 1, cut_tokens + over
            example = Example(example.tokens[:max_seq_length], example.mask[:max_seq_length])
        if example.mask.any():
            examples.append(example)
        else:
            empty += 1
    if not examples:
        raise DataError(f"no row of {len(rows)} has a token that counts in the loss", where=path)
    return Examples(tuple(examples), cut, cut_tokens, empty)


def _join(pieces: Sequence[tuple[list[int], bool]], mask_prompt: bool) -> Example:
    """Ids and mask of a row, built together from pieces (ids, is it an answer)."""
    tokens: list[int] = []
    mask: list[bool] = []
    for ids, answer in pieces:
        tokens += ids
        mask += [answer or not mask_prompt] * len(ids)
    mask[0] = False  # nothing comes before the first token that could predict it
    return Example(np.array(tokens, np.uint32), np.array(mask, bool))


def _tokens(content: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> list[tuple[list[int], bool]]:
    """The pieces (ids, is it an answer) of one row."""
    if "text" in content:
        return [(tokenizer.encode(content["text"], eos=True), False)]
    if "prompt" in content:
        return _turn(content["prompt"], content["completion"], tokenizer)
    turns = _turns(content["messages"], where)
    return [piece for prompt, answer in turns for piece in _turn(prompt, answer, tokenizer)]


def _turn(prompt: str, answer: str, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """A prompt and what follows it, between a begin and an end token.

    Both are encoded as one text, as they would be read; the answer begins where
    that text stops agreeing with the prompt alone.
    """
    alone = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + answer, eos=True)
    same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    return [(whole[:same], False), (whole[same:], True)]


def _turns(messages: Sequence[Mapping[str, str]], where: str) -> list[tuple[str, str]]:
    """(prompt, answer) of each turn of a conversation, in the Llama 2 instruction format."""
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    roles = [message["role"] for message in rest]
    if not rest or roles != ["user", "assistant"] * (len(rest) // 2):
        raise DataError(
            f"messages must alternate user, assistant after an optional system, got {some(roles)}",
            where=where,
        )
    turns: list[tuple[str, str]] = []
    for user, assistant in _parts(rest, 2):
        text = (
            f"<<SYS>>\n{system}\n<</SYS>>\n\n{user['content']}" if system and not turns else user["content"]
        )
        turns.append((f"[INST] {text} [/INST]", f" {assistant['content']}"))
    return turns


# --- batches ------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded on the right.

    Attributes:
        inputs: ids (B, T).
        positions: the places in ``inputs``, counted through its rows, whose
            next token counts in the loss, (N,).
        targets: those next tokens, (N,).
        rows: which examples these are.
    """

    inputs: mx.array
    positions: mx.array
    targets: mx.array
    rows: tuple[int, ...]

    @property
    def counted_tokens(self) -> int:
        """N: how many tokens count in the loss."""
        return self.targets.size


def make_batch(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """The batch of some rows of ``examples``; padding is never among its positions."""
    chosen = [examples[row] for row in rows]
    width = max(len(example.tokens) for example in chosen) - 1
    tokens = np.zeros((len(rows), width + 1), np.uint32)
    counts = np.zeros((len(rows), width + 1), bool)
    for i, example in enumerate(chosen):
        tokens[i, : len(example.tokens)] = example.tokens
        counts[i, : len(example.tokens)] = example.mask
    inputs, targets, mask = tokens[:, :-1], tokens[:, 1:], counts[:, 1:]  # the one shift
    return Batch(mx.array(inputs), mx.array(np.flatnonzero(mask)), mx.array(targets[mask]), tuple(rows))


def epoch_order(examples: Sequence[Example], rows_a_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each step of one epoch: every row once, rows of like length together.

    A function of (seed, epoch) alone. Lengths are jittered before they are
    sorted, so that the company a row keeps changes from epoch to epoch.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    lengths = np.array([len(example.tokens) for example in examples])
    order = np.argsort(lengths * random.uniform(1.0, 1.2, len(lengths)), kind="stable")
    steps = list(_parts(order.tolist(), rows_a_step))
    return [steps[i] for i in random.permutation(len(steps))]


def steps_from(
    examples: Sequence[Example], rows_a_step: int, seed: int, cursor: int = 0
) -> Iterator[list[int]]:
    """The rows of step ``cursor``, of the one after it, and so on without end."""
    steps_an_epoch = -(-len(examples) // rows_a_step)
    epoch, start = divmod(cursor, steps_an_epoch)
    while True:
        yield from epoch_order(examples, rows_a_step, seed, epoch)[start:]
        epoch, start = epoch + 1, 0


def fixed_batches(examples: Sequence[Example], batch_size: int, batches: int) -> Iterator[Batch]:
    """The same batches each time, tail included: the first ``batches`` of the rows, or all for -1."""
    rows = range(len(examples) if batches < 0 else min(len(examples), batches * batch_size))
    order = sorted(rows, key=lambda row: (len(examples[row].tokens), row))
    for part in _parts(order, batch_size):
        yield make_batch(examples, part)


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of ``size`` items, the last one shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))
