"""Rows as people hand them over: a data path, a list, or a list for each split; all read in one way.

Light: rows are read, and refused, before a model is loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxlora_core.errors import DataError, UsageError, listing, nearest
from mlxlora_core.files.data_path import SPLITS, DataFiles, absence, find_data
from mlxlora_core.files.row_messages import RowFault
from mlxlora_core.files.row_shapes import parse_columns, read_row
from mlxlora_core.files.rows import Faults, RowFile, left_out, refuse_empty, refuse_faults, scan_rows

#: a data path, the rows of one split, or the rows of each
Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split, all of plain shapes.

    Attributes:
        name: what errors call them.
        parts: what stands before the number of a row, and (number, content) of each, one after another.
        notes: what there is to tell of their reading.
        files: that they were read from.
    """

    name: str
    parts: Sequence[tuple[str, Sequence[tuple[int, Mapping[str, Any]]]]]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(place, content) of each row."""
        return ((f"{place}{number}", row) for place, rows in self.parts for number, row in rows)


def read_data(
    data: Rows,
    wanted: Sequence[str],
    optional: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> dict[str, SplitRows]:
    """The rows of some splits; all that is wrong with any of them is told at once.

    Args:
        data: a folder with a file for each split; one file, or rows, which are of
            the first split; or the rows of each split.
        wanted: the splits that must be there.
        optional: splits to read where there are rows of them.
        columns: what is read -> the column that it is read from, see
            :func:`~mlxlora_core.files.row_shapes.parse_columns`.

    Returns:
        split -> its rows; an optional one without rows is left out.

    Raises:
        UsageError: a name that is none of a split.
        DataError: nothing that rows could come from, bad rows, or no row of a split that must be there.
    """
    _check_names([*wanted, *optional])
    if isinstance(data, str | os.PathLike):
        return _read_files(Path(data), wanted, optional, columns)
    if not isinstance(data, Mapping):
        data = {wanted[0]: data}
    _check_names(data)
    listed = {split: _listed(data[split], split) for split in (*wanted, *optional) if split in data}
    for split in wanted:
        if split not in listed:
            raise DataError(f"there are no {split} rows (there are {listing(data)})")
        if not listed[split]:
            raise DataError("there is no row", where=f"{split} rows")
    faults = Faults()
    read = {split: _in_memory(split, rows, columns, faults) for split, rows in listed.items() if rows}
    if faults:
        raise faults.told()
    return read


def columns_from(given: Mapping[str, str] | Iterable[str], spell: str = "columns") -> dict[str, str]:
    """Which column each thing is read from, as a caller says it.

    Args:
        given: ``{"prompt": "question"}``, ``["prompt=question"]`` or ``"prompt=question"``.
        spell: what the caller calls it, for messages.

    Raises:
        UsageError: it is no such thing.
    """
    given = given.split(",") if isinstance(given, str) else given
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        return parse_columns(pair if isinstance(pair, str) else "=".join(map(str, pair)) for pair in pairs)
    except ValueError as fault:
        raise UsageError(f"{spell}: {fault}") from None


def _read_files(
    path: Path, wanted: Sequence[str], optional: Sequence[str], columns: Mapping[str, str] | None
) -> dict[str, SplitRows]:
    """As :func:`read_data`, of a data path."""
    files = find_data(path)
    paths = _paths(path, files, wanted, optional)
    found: dict[str, list[RowFile]] = {split: [] for split in paths}
    unreadable = []
    for split, parts in paths.items():
        for part in parts:
            try:
                found[split].append(scan_rows(part, columns))
            except DataError as fault:
                unreadable.append(fault)
    if unreadable:
        raise unreadable[0] if len(unreadable) == 1 else DataError("; ".join(map(str, unreadable)))
    refuse_faults([held for parts in found.values() for held in parts])
    for split in wanted:
        if not any(held.rows for held in found[split]):
            refuse_empty(found[split][0])
    read = {split: _of_files(split, parts) for split, parts in found.items() if any(p.rows for p in parts)}
    first = wanted[0]
    return read | {first: replace(read[first], notes=(*read[first].notes, *_beside(path, files, first)))}


def _paths(
    path: Path, files: DataFiles, wanted: Sequence[str], optional: Sequence[str]
) -> Mapping[str, Sequence[Path]]:
    """split -> its files; where none is named after a split, all are of the first that must be there."""
    paths = files.splits or {wanted[0]: files.others}
    for split in wanted:
        if split not in paths and files.splits:
            raise absence(path, split)
        if split not in paths:
            raise DataError(
                f"has no file named after a split, so that all of it is {wanted[0]} rows; {split} rows are "
                "wanted too",
                where=path,
                fix=f"name a folder with files for {' and '.join(wanted)}",
            )
    return {split: paths[split] for split in (*wanted, *optional) if split in paths}


def _of_files(split: str, files: Sequence[RowFile]) -> SplitRows:
    """The rows of a split out of its files."""
    notes = [note for held in files for note in _words(split, held)]
    parts = [(f"{held.path}:", held.rows) for held in files]
    paths = tuple(held.path for held in files)
    return SplitRows(listing(paths), parts, tuple(notes), paths)


def _beside(path: Path, files: DataFiles, split: str) -> Iterator[str]:
    """What there is to tell of the files of a folder."""
    names = listing(file.name for file in files.others)
    if files.splits and files.others:
        yield f"not read: {names} of {path}"
    elif len(files.others) > 1 or files.others[:1] not in ((), (path,)):
        yield f"no file of {path} is named after a split: all rows are {split} rows ({names})"


def _words(split: str, found: RowFile) -> Iterator[str]:
    """What there is to tell of the rows of a split."""
    for form, count in found.forms.items():
        plain = "prompt and completion" if form.startswith("instruction") else "messages"
        yield f"{count} {split} row{'s'[: count - 1]} of {form}, read as {plain}"
    for what in left_out(found):
        yield f"{split}: {what}"


def _in_memory(
    split: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, faults: Faults
) -> SplitRows:
    """Rows that stand in no file; what is wrong with them goes to ``faults``."""
    place, good = f"{split} row ", []
    forms, unread = Counter[str](), Counter[str]()
    for number, content in enumerate(rows, start=1):
        try:
            row = read_row(content, columns)
        except RowFault as fault:
            faults.add(place, number, str(fault), fault.fix)
            continue
        good.append((number, row.content))
        forms.update([row.form] if row.form else [])
        unread.update(row.unread)
    told = RowFile(Path(), forms=forms, unread=unread)
    return SplitRows(f"{split} rows", [(place, good)], tuple(_words(split, told)))


def _check_names(splits: Iterable[object]) -> None:
    for split in splits:
        if split not in SPLITS:
            raise UsageError(
                f"there is no split {split!r} ({nearest(str(split), SPLITS)}there is {listing(SPLITS)})"
            )


def _listed(rows: object, split: str) -> list[Mapping[str, Any]]:
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | os.PathLike | Mapping):
        return list(rows)
    raise DataError(f"{split} rows: wanted a list of rows such as {{'text': …}}, got {type(rows).__name__}")
