"""Rows as people hand them over: a data path, a list, or a list for each split; all read in one way.

Light: rows are read, and refused, before a model is loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.errors import DataError, UsageError, listing, nearest
from mlxlora_core.files.data_path import SPLITS, DataFiles, absence, find_data
from mlxlora_core.files.row_shapes import RowFault, parse_columns, read_row
from mlxlora_core.files.rows import Faults, RowFile, left_out, refuse_empty, refuse_faults, scan_rows

#: a data path, the rows of one split, or the rows of each
Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split, all of plain shapes.

    Attributes:
        name: what errors call them.
        rows: (place, content) of each.
        notes: what there is to tell of their reading.
    """

    name: str
    rows: Sequence[tuple[str, Mapping[str, Any]]]
    notes: tuple[str, ...] = ()


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
        given: ``{"prompt": "question"}`` or ``["prompt=question"]``.
        spell: what the caller calls it, for messages.

    Raises:
        UsageError: it is no such thing.
    """
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
    found: dict[str, RowFile] = {}
    unreadable = []
    for split, file in paths.items():
        try:
            found[split] = scan_rows(file, columns)
        except DataError as fault:
            unreadable.append(fault)
    if unreadable:
        raise unreadable[0] if len(unreadable) == 1 else DataError("; ".join(map(str, unreadable)))
    refuse_faults(found.values())
    for split in wanted:
        refuse_empty(found[split])
    unread = [f"not read: {listing(file.name for file in files.others)} of {path}"] if files.splits else []
    beside = unread if files.others else []
    return {
        split: _of_file(split, held, [*_words(split, held), *(beside if split == wanted[0] else [])])
        for split, held in found.items()
        if held.rows
    }


def _paths(
    path: Path, files: DataFiles, wanted: Sequence[str], optional: Sequence[str]
) -> Mapping[str, Path]:
    """split -> its file; a single file is all of the first split that must be there."""
    paths = files.splits or ({} if path.is_dir() else {wanted[0]: path})
    for split in wanted:
        if split not in paths:
            raise (
                absence(path, split)
                if path.is_dir()
                else DataError(
                    f"is one file, of {wanted[0]} rows, and {split} rows are wanted too",
                    where=path,
                    fix=f"name a folder with a file for each: {', '.join(wanted)}",
                )
            )
    return {split: paths[split] for split in (*wanted, *optional) if split in paths}


def _of_file(split: str, found: RowFile, notes: Sequence[str]) -> SplitRows:
    rows = [(f"{found.path}:{line}", content) for line, content in found.rows]
    return SplitRows(str(found.path), rows, tuple(notes))


def _words(split: str, found: RowFile) -> Iterator[str]:
    """What there is to tell of the rows of a split."""
    for form, count in found.forms.items():
        plain = "prompt and completion" if form.startswith("instruction") else "messages"
        yield f"{count} {split} rows of {form} are read as {plain}"
    for what in left_out(found):
        yield f"{split}: {what}"


def _in_memory(
    split: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, faults: Faults
) -> SplitRows:
    """Rows that stand in no file; what is wrong with them goes to ``faults``."""
    good, forms, unread = [], Counter[str](), Counter[str]()
    for number, content in enumerate(rows, start=1):
        try:
            row = read_row(content, columns)
        except RowFault as fault:
            faults.add(f"{split} row ", number, str(fault), fault.fix)
            continue
        good.append((f"{split} row {number}", row.content))
        forms.update([row.form] if row.form else [])
        unread.update(row.unread)
    told = RowFile(Path(), forms=forms, unread=unread)
    return SplitRows(f"{split} rows", good, tuple(_words(split, told)))


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
