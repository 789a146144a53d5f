"""Markdown files -> one row for each heading and the section below it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.api import DataError, Row, Rows, Skipped, listing

# CommonMark 0.31.2, sections 2.1, 4.2 and 4.5: up to three spaces, then the marks.
_LINE_END = re.compile(r"\r\n|\r|\n")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]+(.*))?")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


def rows(path: Path, form: str, limit: int) -> Rows:
    """The rows of a Markdown file, or of every ``*.md`` in a folder.

    Args:
        path: the file or the folder.
        form: ``text`` or ``prompt``.
        limit: longest section, in characters; a longer one is skipped.

    Raises:
        DataError: there is no such path, no Markdown file below it, or no row in them.
    """
    made: list[Row] = []
    skipped: list[Skipped] = []
    versions = {}
    for file in find(path):
        name = _name(file, path)
        data = file.read_bytes()
        versions[name] = "sha256:" + hashlib.sha256(data).hexdigest()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as fault:
            skipped.append(Skipped(name, f"is not UTF-8: {fault.reason} at byte {fault.start}"))
            continue
        for line, heading, section in sections(text):
            reason = _unfit(heading, section, limit)
            if reason:
                skipped.append(Skipped(f"{name}:{line}", reason))
            else:
                # One text under two headings must not stand in two splits.
                made.append(Row(_content(heading, section, form), group=section))
    if not made:
        reasons = listing(f"{part.source}: {part.reason}" for part in skipped)
        raise DataError(f"no heading with a text below it ({reasons})", where=path)
    return Rows(made, skipped, versions)


def stamps(path: Path) -> Mapping[str, str]:
    """File -> size and time of change, for all that :func:`rows` would read.

    Raises:
        DataError: as :func:`rows`.
    """
    found = {_name(file, path): file.stat() for file in find(path)}
    return {name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in found.items()}


def find(path: Path) -> list[Path]:
    """The Markdown files of a path, sorted by name; links to folders are not followed.

    Raises:
        DataError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError("there is no such file or folder", where=path, fix="set path to Markdown files")
    walk = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    found = sorted(file for file in walk if file.suffix.lower() == ".md" and file.is_file())
    if not found:
        raise DataError("there is no *.md in this folder", where=path, fix="set path to Markdown files")
    return found


def sections(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, heading, section) for each heading; what stands before the first one has no heading.

    A section ends at the next heading of any level. Marks inside a fenced block are text.
    """
    start, heading, body = 1, "", list[str]()
    fence = ""
    for number, line in enumerate(_LINE_END.split(text), start=1):
        fence = _fence(line, fence)
        match = None if fence else _HEADING.fullmatch(line)
        if match is None:
            body.append(line)
            continue
        if heading or "".join(body).strip():
            yield start, heading, "\n".join(body).strip()
        start, heading, body = number, _title(match[1] or ""), []
    if heading or "".join(body).strip():
        yield start, heading, "\n".join(body).strip()


def _title(text: str) -> str:
    """What a heading says, without the marks that may close it."""
    title = text.strip(" \t")
    bare = title.rstrip("#")
    return bare.rstrip(" \t") if not bare or bare[-1] in " \t" else title


def _fence(line: str, opened: str) -> str:
    """The marks of the fenced block that stays open after ``line``, or nothing."""
    match = _FENCE.fullmatch(line)
    if match is None:
        return opened
    marks, rest = match[1], match[2].strip()
    if not opened:
        return "" if marks[0] == "`" and "`" in rest else marks
    closes = marks[0] == opened[0] and len(marks) >= len(opened) and not rest
    return "" if closes else opened


def _unfit(heading: str, section: str, limit: int) -> str:
    """Why a section makes no row, or nothing."""
    if not heading:
        return "text without a heading"
    if not section:
        return "a heading without text"
    return f"{len(section)} characters, the limit is {limit}" if len(section) > limit else ""


def _content(heading: str, section: str, form: str) -> dict[str, Any]:
    question = f"Q: {heading}\nA:"
    if form == "prompt":
        return {"prompt": question, "completion": f" {section}"}
    return {"text": f"{question} {section}"}


def _name(file: Path, path: Path) -> str:
    """A file's name as records show it: the same wherever the folder stands."""
    return file.name if file == path else file.relative_to(path).as_posix()
