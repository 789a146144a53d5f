"""Rows in a table of comma-separated values: the first line names the columns."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader

from mlxlora_core.files.jsonl import LINE_BYTES, Record, read_text, short

_OTHER_DELIMITERS = ";\t"  # tried where the heading has no comma
_HEADING_LETTERS = 1 << 16  # it is looked for in
_QUOTED = re.compile(r'"[^"]*"')
_LINE_END = re.compile(r"[\r\n]")


def read_table(file: BufferedReader, delimiter: str = ",") -> Iterator[Record]:
    """Each row of a table as column -> cell; all cells are texts.

    Args:
        file: at its beginning.
        delimiter: between cells; where a heading has no comma but semicolons or
            tabs, these are taken.
    """
    text, unreadable = read_text(file)
    if unreadable is not None:
        yield unreadable
        return
    heading = _QUOTED.sub("", text[:_HEADING_LETTERS]).lstrip("\r\n")  # what is quoted may hold any of them
    heading = _LINE_END.split(heading, maxsplit=1)[0]
    if delimiter not in heading:
        delimiter = next((other for other in _OTHER_DELIMITERS if other in heading), delimiter)
    with _long_cells():
        yield from _rows(text, delimiter)


def _rows(text: str, delimiter: str) -> Iterator[Record]:
    """The rows behind the heading, and what is wrong with either."""
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    heading: list[str] = []
    while True:
        line = table.line_num + 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as fault:
            yield Record(line, fault=f"no table: {fault}")
            continue
        if not any(cells):
            yield Record(line, blank=True)
        elif not heading:
            heading = [cell.strip() for cell in cells]
            if odd := _heading_fault(heading):
                yield Record(line, fault=odd)
                return
        elif len(cells) != len(heading):
            yield Record(line, fault=f"has {len(cells)} cells, the heading {len(heading)}")
        else:
            yield Record(line, dict(zip(heading, cells, strict=True)))


def _heading_fault(heading: list[str]) -> str:
    """What is wrong with the names of the columns."""
    name, count = Counter(heading).most_common(1)[0]
    told = short(name) or "''"
    return f"names the column {told} twice" if count > 1 else ""


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let cells be as long as a line of JSON; the library keeps that limit for the whole process."""
    before = csv.field_size_limit(LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)
