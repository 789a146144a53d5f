"""The dataset folder: rows without repeats, split, and kept in train, valid and test."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from mlxlora_core.errors import DataError, ModelError, listing
from mlxlora_core.files import durable
from mlxlora_core.files.data_path import RECORD, SPLITS
from mlxlora_core.files.documents import read_form
from mlxlora_core.files.forms import Map, Plain, Table, Text, Whole
from mlxlora_core.files.jsonl import line_of
from mlxlora_core.files.row_shapes import read_row
from mlxlora_core.files.rows import read_rows, unread_keys
from mlxlora_core.files.targets import check_output_folder, hold_only_files, paths_in
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Component
from mlxlora_core.plugins.sections import SplitConfig
from mlxlora_core.training.findings import findings_in
from mlxlora_core.values import Row, Rows, Skipped

#: what shows a dataset folder to be one of ours
RECORD_FORM = Table(
    {
        "rows": Map(Whole()),
        "groups": Whole(),
        "builder": Text(),
        "split": Map(Plain()),
        "versions": Map(Text()),
    }
)
_SORTED = json.JSONEncoder(sort_keys=True)
_RECORD_BYTES = 256 << 20  # it may list many sources that were skipped


def build_dataset(
    choice: Choice, config: SplitConfig, folder: Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Let a builder make rows and write them as a dataset folder, whole or not at all.

    Args:
        choice: the dataset builder and its options.
        config: how to split and write the rows.
        folder: dataset folder to make.
        overwrite: whether a dataset folder that is there may be replaced.

    Returns:
        The record, as ``dataset.json`` holds it.

    Raises:
        UsageError: the folder is what the builder reads, or holds it.
        SafetyError: the folder holds something else.
        DataError: no rows, or none left to train on; extra rows that cannot be read.
        PluginError: the builder gives something else.
    """
    read = [*paths_in(choice.options), *paths_in(config)]
    check_output_folder(folder, read, overwrite=overwrite, ours=holds_only_a_dataset)
    builder, options = choice.component, choice.options
    extra = [Row(content) for _, content in read_rows(config.extra_rows)] if config.extra_rows else []
    rows = builder.checked("build", builder.spec.build(options), Rows)
    rows = _as_agreed(rows, builder)
    with durable.new_folder(folder, overwrite=overwrite, ours=holds_only_a_dataset) as new:
        return write_dataset(rows, new, config, {"builder": builder.id, "options": options}, extra)


def holds_only_a_dataset(folder: Path) -> bool:
    """Whether everything in ``folder`` is what mlxlora writes into a dataset folder, by its record."""
    try:
        read_form(folder / RECORD, RECORD_FORM, _RECORD_BYTES)
    except ModelError:
        return False
    return hold_only_files(folder, [RECORD, *(f"{split}.jsonl" for split in SPLITS)])


def write_dataset(
    rows: Rows,
    folder: Path,
    config: SplitConfig,
    made_by: Mapping[str, Any],
    extra: Sequence[Row] = (),
) -> dict[str, Any]:
    """Dedupe and split ``rows`` into ``train.jsonl``, ``valid.jsonl``, ``test.jsonl`` and ``dataset.json``.

    Args:
        rows: what a builder made.
        folder: where the files go.
        config: how to split and write them.
        made_by: builder and options, for the record.
        extra: rows to train on beside those, which are not split.

    Returns:
        The record, as ``dataset.json`` holds it.

    Raises:
        DataError: no rows, none left to train on, or a split that there is not.
    """
    sound, odd = _sound(rows.rows)
    skipped = [*rows.skipped, *odd]
    kept = _without_repeats(sound)
    if not kept:
        raise DataError(f"no rows were made (skipped: {listing(f'{s.source}: {s.reason}' for s in skipped)})")
    groups = _groups(sound)
    by_split = _split(kept, groups, config)
    if not by_split["train"]:
        raise DataError(f"none of {len(kept)} rows is in the train split")
    by_split["train"] = _without_repeats([*by_split["train"], *extra])
    for name in SPLITS:
        with durable.new_file(folder / f"{name}.jsonl") as file:
            _write_rows(by_split[name], config, file)
    record = {
        "rows": {name: len(by_split[name]) for name in SPLITS},
        "groups": len(set(groups.values())),
        "repeated_rows": len(sound) - len(kept),
        "extra_rows": len(extra),
        "rows_in_two_splits": _overlap(by_split),
        "versions": dict(rows.versions),
        **plain(made_by),
        "split": plain(config),
        "skipped": [{"source": s.source, "reason": s.reason} for s in skipped],
        "findings": _findings(by_split),
    }
    durable.write_json(folder / RECORD, record)
    return record


def _findings(by_split: Mapping[str, Sequence[Row]]) -> list[str]:
    """A line on each thing that somebody should know of the rows."""
    return [
        line
        for name, rows in by_split.items()
        for line in findings_in(
            (f"{name}.jsonl:{number}", row.content) for number, row in enumerate(rows, start=1)
        ).sentences(name)
    ]


def _as_agreed(rows: Rows, builder: Component) -> Rows:
    """What a builder gives, once it has been held against what builders may give.

    Raises:
        PluginError: it is something else.
    """

    def need(value: object, kind: Any, want: str) -> None:
        if not isinstance(value, kind):
            raise builder.breach("build", type(value).__name__, want)

    for given in (rows.rows, rows.skipped):
        need(given, Iterable, "lists of rows and of what was skipped")
    rows = replace(rows, rows=list(rows.rows), skipped=list(rows.skipped))
    for row in rows.rows:
        need(row, Row, "Row")
        need(row.content, Mapping, "rows whose content is an object")
        need(row.group, str, "rows whose group is a text")
        need(row.split, str | None, "rows whose split is a text or None")
    for skip in rows.skipped:
        need(skip, Skipped, "Skipped")
        for part in (skip.source, skip.reason):
            need(part, str, "texts that tell what was skipped")
    need(rows.versions, Mapping, "versions by their names")
    for part in (*rows.versions, *rows.versions.values()):
        need(part, str, "versions that are texts")
    return rows


def _sound(rows: Sequence[Row]) -> tuple[list[Row], list[Skipped]]:
    """The rows as they are written, which can be read back, and what of them is not."""
    sound, odd, unread = [], [], Counter[str]()
    for number, row in enumerate(rows, start=1):
        try:
            read = read_row(row.content)
            line_of(read.content)
        except ValueError as fault:
            odd.append(Skipped(f"row {number}", str(fault)))
        else:
            sound.append(replace(row, content=read.content))
            unread.update(read.unread)
    return sound, [*odd, *([Skipped("rows", unread_keys(unread))] if unread else [])]


def _write_rows(rows: Sequence[Row], config: SplitConfig, file: BinaryIO) -> None:
    for start in range(0, len(rows), config.write_batch_size):
        part = rows[start : start + config.write_batch_size]
        file.write(b"".join(line_of(row.content) for row in part))


def _without_repeats(rows: Sequence[Row]) -> list[Row]:
    """The rows with each content once, or once a split where the source has settled the splits.

    A row without a split is one to train on when other rows have a split.

    Raises:
        DataError: a split that there is not; its rows would be lost.
    """
    odd = sorted({row.split for row in rows if row.split and row.split not in SPLITS})
    if odd:
        raise DataError(f"there is no split {listing(map(repr, odd))} (there is {listing(SPLITS)})")
    settled = any(row.split for row in rows)
    unique: dict[tuple[str | None, bytes], Row] = {}
    for row in rows:
        split = row.split or ("train" if settled else None)
        unique.setdefault((split, _bytes(row)), replace(row, split=split))
    return list(unique.values())


def _split(rows: Sequence[Row], groups: Mapping[bytes, bytes], config: SplitConfig) -> dict[str, list[Row]]:
    """Rows by split: as the source has settled it, else by groups held out at random.

    Groups are drawn by a hash of (seed, group), so that adding a source moves
    no other row from one split to another more than the shares demand. Few
    groups still give a validation and a test set of one group each.
    """
    if any(row.split for row in rows):
        return {name: [row for row in rows if row.split == name] for name in SPLITS}
    drawn = sorted(set(groups.values()), key=lambda group: _draw(config.split_seed, group))
    held_out = 0
    if config.test_set_size > 0:
        held_out = min(max(2, round(len(drawn) * config.test_set_size)), len(drawn) - 1)
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
    return _SORTED.encode(row.content).encode()


def _draw(seed: int, group: bytes) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + group).digest()
