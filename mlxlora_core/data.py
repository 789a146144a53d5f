"""Rows -> examples -> batches, and the dataset folder they are kept in.

Token ids and their mask are built together by one function, the shift by one
token happens in one line, and the order of batches is a function of (seed,
epoch) alone, so that a place in training is one integer.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import mlx.core as mx
import numpy as np

from mlxlora_core import durable
from mlxlora_core.errors import DataError, some
from mlxlora_core.jsonl import check_content, read_jsonl
from mlxlora_core.options import plain
from mlxlora_core.registry import Component
from mlxlora_core.specs import DatasetOptions, Row, Rows, Skipped
from mlxlora_core.tokenizer import Tokenizer

T = TypeVar("T")

Piece = tuple[list[int], bool]  # ids of a row, and whether they count in the loss

SPLITS = ("train", "valid", "test")
RECORD = "dataset.json"


# --- the dataset folder -------------------------------------------------------


def build_dataset(
    builder: Component, options: DatasetOptions, folder: Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Let a builder make rows and write them as a dataset folder, whole or not at all.

    Args:
        builder: the dataset builder.
        options: of the builder.
        folder: dataset folder to make.
        overwrite: whether a dataset folder that is there may be replaced.

    Returns:
        The record, as ``dataset.json`` holds it.

    Raises:
        SafetyError: the folder holds something else.
        DataError: no rows, or none left to train on.
        PluginError: the builder gives something else.
    """
    durable.check_target(folder, overwrite=overwrite, ours=holds_only_a_dataset)
    rows = builder.gave("build", builder.spec.build(options), Rows)
    for row in rows.rows:
        builder.gave("build", row, Row)
    with durable.new_folder(folder, overwrite=overwrite, ours=holds_only_a_dataset) as new:
        return write_dataset(rows, new, options, {"builder": builder.id, "options": options})


def holds_only_a_dataset(folder: Path) -> bool:
    """Whether everything in ``folder`` is what mlxlora writes into a dataset folder."""
    names = {path.name for path in folder.iterdir()}
    return RECORD in names and names <= {RECORD, *(f"{split}.jsonl" for split in SPLITS)}


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
        DataError: no rows, none left to train on, or a split that there is not.
    """
    sound, odd = _sound(rows.rows)
    skipped = [*rows.skipped, *odd]
    kept = _without_repeats(sound)
    if not kept:
        raise DataError(f"no rows were made (skipped: {some(f'{s.source}: {s.reason}' for s in skipped)})")
    groups = _groups(sound)
    by_split = _split(kept, groups, options)
    if not by_split["train"]:
        raise DataError(f"none of {len(kept)} rows is in the train split")
    for name in SPLITS:
        durable.write_file(folder / f"{name}.jsonl", partial(_write_rows, by_split[name], options))
    record = {
        "rows": {name: len(by_split[name]) for name in SPLITS},
        "groups": len(set(groups.values())),
        "repeated_rows": len(sound) - len(kept),
        "rows_in_two_splits": _overlap(by_split),
        "versions": dict(rows.versions),
        **plain(made_by),
        "skipped": [{"source": s.source, "reason": s.reason} for s in skipped],
    }
    durable.write_json(folder / RECORD, record)
    return record


def _sound(rows: Sequence[Row]) -> tuple[list[Row], list[Skipped]]:
    """The rows that can be read back, and why the others cannot."""
    sound, odd = [], []
    for number, row in enumerate(rows, start=1):
        fault = check_content(dict(row.content))
        if fault is None:
            sound.append(row)
        else:
            odd.append(Skipped(f"row {number}", fault))
    return sound, odd


def _write_rows(rows: Sequence[Row], options: DatasetOptions, file: BinaryIO) -> None:
    for part in _parts(rows, options.write_batch_size):
        lines = [json.dumps(dict(row.content), ensure_ascii=False) + "\n" for row in part]
        file.write("".join(lines).encode())


def _without_repeats(rows: Sequence[Row]) -> list[Row]:
    """The rows with each content once, or once a split where the source has settled the splits.

    A row without a split is one to train on when other rows have a split.

    Raises:
        DataError: a split that there is not; its rows would be lost.
    """
    odd = sorted({row.split for row in rows if row.split and row.split not in SPLITS})
    if odd:
        raise DataError(f"there is no split {some(map(repr, odd))} (there is {some(SPLITS)})")
    settled = any(row.split for row in rows)
    unique: dict[tuple[str | None, bytes], Row] = {}
    for row in rows:
        split = row.split or ("train" if settled else None)
        unique.setdefault((split, _bytes(row)), replace(row, split=split))
    return list(unique.values())


def _split(
    rows: Sequence[Row], groups: Mapping[bytes, bytes], options: DatasetOptions
) -> dict[str, list[Row]]:
    """Rows by split: as the source has settled it, else by groups held out at random.

    Groups are drawn by a hash of (seed, group), so that adding a source moves
    no other row from one split to another more than the shares demand. Few
    groups still give a validation and a test set of one group each.
    """
    if any(row.split for row in rows):
        return {name: [row for row in rows if row.split == name] for name in SPLITS}
    drawn = sorted(set(groups.values()), key=lambda group: _draw(options.split_seed, group))
    held_out = 0
    if options.test_set_size > 0:
        held_out = min(max(2, round(len(drawn) * options.test_set_size)), len(drawn) - 1)
    valid = set(drawn[: (held_out + 1) // 2])
    test = set(drawn[(held_out + 1) // 2 : held_out])
    split: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        group = groups[_bytes(row)]
        split["valid" if group in valid else "test" if group in test else "train"].append(row)
    return split


def _groups(rows: Sequence[Row]) -> dict[bytes, bytes]:
    """The group of each content; groups that share a content are one, and no group is one of its own."""
    same: dict[bytes, bytes] = {}

    def first(group: bytes) -> bytes:
        while group in same:
            group = same[group]
        return group

    found: dict[bytes, bytes] = {}
    for row in rows:
        content = _bytes(row)
        group = first(row.group.encode("utf-8", "surrogatepass") or content)
        held = first(found.setdefault(content, group))
        if group != held:
            same[group] = held
    return {content: first(group) for content, group in found.items()}


def _overlap(by_split: Mapping[str, Sequence[Row]]) -> int:
    """How many contents stand in more than one split."""
    counts = Counter(chain.from_iterable({_bytes(row) for row in rows} for rows in by_split.values()))
    return sum(count > 1 for count in counts.values())


def _bytes(row: Row) -> bytes:
    return json.dumps(dict(row.content), sort_keys=True).encode()


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
    examples, lengths, cut, cut_tokens, empty = [], [], 0, 0, 0
    for line, content in read_jsonl(path):
        try:
            whole = _example(_pieces(content, tokenizer, mask_prompt), tokenizer.bos)
        except DataError as fault:
            raise DataError(fault.what, where=f"{path}:{line}", fix=fault.fix) from fault
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
        raise DataError(f"none of {empty} rows has a token that counts in the loss", where=path)
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


def turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(prompt, answer) of each turn of a conversation, in the Llama 2 instruction format."""
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    roles = [message["role"] for message in rest]
    if not rest or roles != ["user", "assistant"] * (len(rest) // 2):
        raise DataError(
            f"messages must alternate user, assistant after an optional system, got {some(roles)}"
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
    """The same batches each time, tail included: ``batches`` of them, or for -1 all rows.

    Where that is not all rows, they are taken at even distances, so that they
    stand for the whole file.
    """
    count = len(examples) if batches < 0 else min(len(examples), batches * batch_size)
    rows = (i * len(examples) // count for i in range(count))
    for part in _parts(sorted(rows, key=lambda row: len(examples[row].tokens)), batch_size):
        yield make_batch(examples, part)


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of ``size`` items, the last one shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))
