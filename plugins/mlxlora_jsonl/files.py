"""Finds the files, reads them and says which split each row has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.api import DataError, Row, Rows, Skipped
from mlxlora_core.files import JsonLines, content_digest, refuse_faults, scan_jsonl
from mlxlora_jsonl import JsonlOptions

SPLITS = ("train", "valid", "test")


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
    faults, read = [], []
    for source in sources:
        try:
            read.append((source, scan_jsonl(source.path)))
        except DataError as fault:
            faults.append(fault)
    if faults:
        raise faults[0] if len(faults) == 1 else DataError("; ".join(map(str, faults)))
    refuse_faults([lines for _, lines in read])
    rows = [Row(content, split=source.split) for source, lines in read for _, content in lines.rows]
    if not rows:
        raise DataError(f"there is no row in {', '.join(str(source.path) for source in sources)}")
    skipped = [skip for source, lines in read for skip in _left_out(source, lines)]
    return Rows(rows, [*unread, *skipped])


def file_states(options: JsonlOptions) -> dict[str, str]:
    """Path -> digest of its bytes, of every file that would be read."""
    return {str(s.path): content_digest(s.path, DataError) for s in find_sources(options)[0]}


def find_sources(options: JsonlOptions) -> tuple[list[Source], list[Skipped]]:
    """The files that the options name, each once, and the files beside them that are not read.

    Raises:
        DataError: a folder without a ``.jsonl`` file.
    """
    sources, unread = [], []
    if options.path is not None and options.path.is_dir():
        inside = sorted(path for path in options.path.iterdir() if path.suffix == ".jsonl")
        if not inside:
            raise DataError("there is no .jsonl file in this folder", where=options.path)
        settled = [Source(path, path.stem) for path in inside if path.stem in SPLITS]
        sources = settled or [Source(path) for path in inside]
        if settled:
            reason = "it stands beside train.jsonl, valid.jsonl or test.jsonl, and only those are read"
            unread = [Skipped(str(path), reason) for path in inside if path.stem not in SPLITS]
    elif options.path is not None:
        sources = [Source(options.path)]
    seen = {source.path for source in sources}
    sources += [Source(path) for path in dict.fromkeys(options.files) if path not in seen]
    return sources, unread


def _left_out(source: Source, lines: JsonLines) -> Iterator[Skipped]:
    """What a file holds that gives no row, though it is no fault."""
    if lines.blank_lines:
        yield Skipped(str(source.path), f"{lines.blank_lines} blank lines")
    if not lines.rows:
        yield Skipped(str(source.path), "there is no row in it")
