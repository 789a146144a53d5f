"""Finds the files, reads them and says which split each row has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import DataError, Row, Rows, Skipped
from mlxlora_core.files import (
    RowFile,
    content_digest,
    find_data,
    left_out,
    parse_columns,
    refuse_faults,
    scan_rows,
)
from mlxlora_jsonl import JsonlOptions


@dataclass(frozen=True)
class Source:
    """A file to read, and the split that all its rows have, if it settles one."""

    path: Path
    split: str | None = None


def build_rows(options: JsonlOptions) -> Rows:
    """The rows of all files; what is wrong with any of them is told at once.

    Raises:
        DataError: a file that cannot be read, bad lines, or no row at all.
    """
    sources, unread = find_sources(options)
    columns = parse_columns(options.columns)
    faults, read = [], []
    for source in sources:
        try:
            read.append((source, scan_rows(source.path, columns)))
        except DataError as fault:
            faults.append(fault)
    if faults:
        raise faults[0] if len(faults) == 1 else DataError("; ".join(map(str, faults)))
    refuse_faults([found for _, found in read])
    rows = [Row(content, split=source.split) for source, found in read for _, content in found.rows]
    if not rows:
        raise DataError(f"there is no row in {', '.join(str(source.path) for source in sources)}")
    skipped = [skip for source, found in read for skip in _left_out(source, found)]
    return Rows(rows, [*unread, *skipped])


def file_states(options: JsonlOptions) -> dict[str, str]:
    """Path -> digest of its bytes, of every file that would be read."""
    return {str(s.path): content_digest(s.path, DataError) for s in find_sources(options)[0]}


def find_sources(options: JsonlOptions) -> tuple[list[Source], list[Skipped]]:
    """The files that the options name, each once, and the files beside them that are not read.

    Raises:
        DataError: a folder without a file of rows, or with two for one split.
    """
    sources: list[Source] = []
    unread: list[Skipped] = []
    if options.path is not None:
        found = find_data(options.path)
        sources = [Source(path, split) for split, paths in found.splits.items() for path in paths]
        if found.splits:
            reason = "it stands beside files of the splits train, valid or test, and only those are read"
            unread = [Skipped(str(path), reason) for path in found.others]
        else:
            sources = [Source(path) for path in found.others]
    seen = {source.path for source in sources}
    sources += [Source(path) for path in dict.fromkeys(options.files) if path not in seen]
    return sources, unread


def _left_out(source: Source, found: RowFile) -> Iterator[Skipped]:
    """What a file holds that gives no row, though it is no fault."""
    yield from (Skipped(str(source.path), what) for what in left_out(found))
    if not found.rows:
        yield Skipped(str(source.path), "there is no row in it")
