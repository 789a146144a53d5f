"""Rows in a file of any of the formats, with all that is wrong with it told by kind and line.

``.jsonl`` has one JSON object a line, ``.json`` one array of them or the same,
``.csv`` and ``.tsv`` a table whose first line names its columns. All are UTF-8.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from mlxlora_core.errors import DataError, listing
from mlxlora_core.files.csv_table import read_table
from mlxlora_core.files.input_file import open_regular
from mlxlora_core.files.jsonl import Record, begins_array, read_array, read_lines
from mlxlora_core.files.row_messages import RowFault
from mlxlora_core.files.row_shapes import read_row

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")

_KINDS_TOLD = 5
_PLACES_TOLD = 5  # of each kind
_LETTERS_TOLD = 1500  # of all kinds together
_PATH_LETTERS = 160  # so much of a path is told where many places are
_NUMBER = re.compile(r"\d+")
_BOM = b"\xef\xbb\xbf"
# The first bytes of files that are no UTF-8 text, and what they are; the longest first.
_FOREIGN = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"BZh91AY&SY", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
)
_REMEDIES = {
    **{"gzip": "gunzip it", "zip": "unzip it", "bzip2": "bunzip2 it", "xz": "unxz it", "zstd": "unzstd it"},
    **dict.fromkeys(("parquet", "arrow"), "save it as JSON Lines"),
}


@dataclass
class Kind:
    """Faults of one kind in one file.

    Attributes:
        what: the first of them.
        fix: what to do about it, where that is known.
        count: how many there are.
        lines: the first lines that have it.
    """

    what: str
    fix: str
    count: int = 0
    lines: list[int] = field(default_factory=list)


class Faults:
    """What is wrong with rows, by kind: faults that differ in numbers alone are of one."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], Kind] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(kind.count for kind in self._kinds.values())

    def add(self, place: str, line: int, what: str, fix: str = "") -> None:
        """Note a fault.

        Args:
            place: what stands before the number of a line: ``train.jsonl:``.
            line: where it is.
            what: the fault.
            fix: what to do about it.
        """
        kind = self._kinds.setdefault((place, _NUMBER.sub("#", what)), Kind(what, fix))
        kind.count += 1
        if len(kind.lines) < _PLACES_TOLD:
            kind.lines.append(line)

    def told(self) -> DataError:
        """The error that names the first kinds with their first places, and how many faults there are."""
        kinds = [(place, kind) for (place, _), kind in self._kinds.items()]
        words: list[str] = []
        for place, kind in kinds[:_KINDS_TOLD]:
            if sum(map(len, words)) < _LETTERS_TOLD - 2 * _PATH_LETTERS or not words:
                words.append(_told(place, kind))
        rest = self.count - sum(kind.count for _, kind in kinds[: len(words)])
        total = "1 bad line" if self.count == 1 else f"{self.count} bad lines"
        fix = next((kind.fix for _, kind in kinds[: len(words)] if kind.fix), "")
        return DataError(f"{total}: {'; '.join(words)}{f'; and {rest} more' if rest else ''}", fix=fix)

    def update(self, others: Faults) -> None:
        """Take in the faults of another file."""
        self._kinds |= others._kinds


@dataclass(frozen=True)
class RowFile:
    """What one file holds.

    Attributes:
        path: the file.
        rows: (line, content) of the good rows, each of a plain shape.
        blank_lines: how many lines had nothing on them.
        faults: what is wrong with the others.
        forms: shape that rows came in, where it was no plain one -> how many.
        unread: key that holds something and is not read -> in how many rows.
    """

    path: Path
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    blank_lines: int = 0
    faults: Faults = field(default_factory=Faults)
    forms: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, content) of every row of a file.

    Raises:
        DataError: the file cannot be read, has a bad line (all are told by kind), or has no row.
    """
    found = scan_rows(path)
    refuse_faults([found])
    refuse_empty(found)
    return found.rows


def scan_rows(path: Path, columns: Mapping[str, str] | None = None) -> RowFile:
    """All rows and all faults of a file.

    Args:
        path: its ending says the format; one that is not known is JSON Lines.
        columns: what is read -> the column that it is read from, see
            :func:`~mlxlora_core.files.row_shapes.parse_columns`.

    Raises:
        DataError: it is missing, no regular file, unreadable, or no UTF-8 text.
    """
    rows, faults, blank = [], Faults(), 0
    forms: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    place = f"{_short_path(path)}:"
    with _open(path) as file:
        for record in _records(file, path):
            if record.blank:
                blank += 1
            elif record.fault:
                faults.add(place, record.line, record.fault)
            else:
                try:
                    row = read_row(record.value, columns)
                except RowFault as fault:
                    faults.add(place, record.line, str(fault), fault.fix)
                    continue
                rows.append((record.line, row.content))
                forms.update([row.form] if row.form else [])
                unread.update(row.unread)
    return RowFile(path, rows, blank, faults, forms, unread)


def refuse_faults(files: Iterable[RowFile]) -> None:
    """Raise one DataError that tells all that is wrong with ``files``, by kind, and how many rows that is."""
    faults = Faults()
    for found in files:
        faults.update(found.faults)
    if faults:
        raise faults.told()


def refuse_empty(found: RowFile) -> None:
    """Raise a DataError where a file has no row."""
    if not found.rows:
        blank = f" but {found.blank_lines} blank lines" if found.blank_lines else ""
        raise DataError(f"there is no row in it{blank}", where=found.path)


def left_out(found: RowFile) -> Iterator[str]:
    """What a file holds that no row is made of, though it is no fault; in words."""
    if found.blank_lines:
        yield f"{found.blank_lines} blank line{'s'[: found.blank_lines - 1]}"
    if found.unread:
        yield unread_keys(found.unread)


def unread_keys(unread: Mapping[str, int]) -> str:
    """key that holds something and is not read -> in how many rows; in words."""
    keys = (f"{key} ({count} row{'s'[: count - 1]})" for key, count in unread.items())
    return f"keys that are not read: {listing(keys)}"


def _records(file: BufferedReader, path: Path) -> Iterator[Record]:
    """What stands in a file, by its ending."""
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return read_table(file, "\t" if ending == ".tsv" else ",")
    if ending == ".json" and begins_array(file):
        return read_array(file)
    return read_lines(file)


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    """The file, read up to its first line."""
    with open_regular(path, DataError) as file:
        try:
            _pass_mark(file, path)
            yield file
        except OSError as fault:
            raise DataError(f"cannot be read: {fault.strerror}", where=path) from fault


def _pass_mark(file: BufferedReader, path: Path) -> None:
    """Go past a UTF-8 byte order mark, and refuse what is no UTF-8 text by its first bytes."""
    start = file.peek(16)
    if encoding := _encoding(start):
        fix = _REMEDIES.get(encoding, f"iconv -f {encoding} -t UTF-8")
        raise DataError(f"is {encoding}, wanted UTF-8 text", where=path, fix=fix)
    if start.startswith(_BOM):
        file.seek(len(_BOM))


def _encoding(start: bytes) -> str:
    """What a file is that begins so, if it is no UTF-8 text; nothing where it may be."""
    for mark, encoding in _FOREIGN:
        if start.startswith(mark):
            return encoding
    low, high = start[:1], start[1:2]  # of letters of one byte, the other one is zero
    if high == b"\0" < low:
        return "UTF-16LE"
    return "UTF-16BE" if low == b"\0" < high else ""


def _told(place: str, kind: Kind) -> str:
    """A kind in words, with its places."""
    if kind.count == 1:
        return f"{place}{kind.lines[0]}: {kind.what}"
    more = ", …" if kind.count > len(kind.lines) else ""
    lines = ", ".join(map(str, kind.lines))
    return f"{place}{kind.lines[0]}: {kind.what} ({kind.count} of this kind: {lines}{more})"


def _short_path(path: Path) -> str:
    text = str(path)
    return text if len(text) <= _PATH_LETTERS else f"…{text[-_PATH_LETTERS:]}"
