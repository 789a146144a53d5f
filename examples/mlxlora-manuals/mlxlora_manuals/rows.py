"""Parts of pages -> rows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlxlora_core.api import DataError, Row, Rows, Skipped, UsageError, listing, report_progress
from mlxlora_manuals import files, markdown, rst
from mlxlora_manuals.parts import Code, Heading, Left, Part, Text

_DEEP = "blocks nest too deep in each other"
_FENCE = re.compile(r"^`{3,}", re.MULTILINE)


def rows(path: Path, form: str, languages: Iterable[str], limit: int) -> Rows:
    """The rows of a manual, or of all in a folder, and whatever gave none.

    Args:
        path: the file or the folder.
        form: ``text``, ``prompt`` or ``code``.
        languages: of code blocks, for ``code``; none is all.
        limit: longest section or code block, in characters; a longer one is skipped.

    Raises:
        UsageError: languages for another form than ``code``.
        DataError: there is no such path, no manual below it, or no row in them.
    """
    wanted = frozenset(map(str.lower, languages))
    if wanted and form != "code":
        raise UsageError("languages are those of code blocks", fix="set form=code, or leave them out")
    made, skipped, versions = list[Row](), list[Skipped](), {}
    found = files.find(path)
    for done, file in enumerate(found):
        report_progress("reading manuals", done, len(found))
        name = files.named(file, path)
        try:
            data = files.read(file)
            versions[name] = "sha256:" + hashlib.sha256(data).hexdigest()
            page = list(_parts(file, files.text_of(data)))
        except (DataError, UnicodeDecodeError, RecursionError) as fault:
            skipped.append(Skipped(name, _reason(fault)))
            continue
        for line, given in _of_page(page, form, wanted, limit):
            if isinstance(given, Row):
                made.append(given)
            else:
                skipped.append(Skipped(f"{name}:{line}", given))
    if not made:
        reasons = listing(f"{part.source}: {part.reason}" for part in skipped)
        raise DataError(f"nothing makes a row ({reasons})", where=path)
    return Rows(made, skipped, versions)


def _parts(file: Path, text: str) -> Iterator[Part]:
    return rst.parts(text) if file.suffix.lower() == ".rst" else markdown.parts(text)


def _reason(fault: Exception) -> str:
    if isinstance(fault, UnicodeDecodeError):
        return f"is not UTF-8: {fault.reason} at byte {fault.start}"
    return _DEEP if isinstance(fault, RecursionError) else getattr(fault, "what", str(fault))


@dataclass
class _Section:
    """What stands below a heading, up to the next.

    Attributes:
        titles: the heading, behind those that it is below.
        line: of the heading.
        body: its texts and code blocks.
    """

    titles: tuple[str, ...]
    line: int
    body: list[Text | Code] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Where it is."""
        return " > ".join(self.titles)


def _of_page(
    page: list[Part], form: str, wanted: frozenset[str], limit: int
) -> Iterator[tuple[int, Row | str]]:
    """(line, a row or why there is none) of all that a page holds."""
    yield from ((part.line, part.reason) for part in page if isinstance(part, Left))
    for section in _sections(page):
        if form == "code":
            yield from _code_rows(section, wanted, limit)
        else:
            yield section.line, _row(section, form, limit)


def _sections(page: list[Part]) -> Iterator[_Section]:
    """The sections of a page; what stands before the first heading has no title."""
    titles: list[tuple[int, str]] = []
    section = _Section((), 1)
    for part in page:
        if isinstance(part, Heading):
            if section.titles or section.body:
                yield section
            titles = [
                *((level, text) for level, text in titles if level < part.level),
                (part.level, part.text),
            ]
            section = _Section(tuple(text for _, text in titles if text), part.line)
        elif not isinstance(part, Left):
            section.body.append(part)
    if section.titles or section.body:
        yield section


def _row(section: _Section, form: str, limit: int) -> Row | str:
    body = "\n\n".join(map(_shown, section.body))
    if not section.titles:
        return "text without a heading"
    if not body:
        return "a heading without text"
    if len(body) > limit:
        return f"{len(body)} characters, the limit is {limit}"
    if form == "text":
        return Row({"text": f"{section.path}\n\n{body}"}, group=body)
    return Row({"prompt": f"{section.path}\n\n", "completion": body}, group=body)


def _code_rows(section: _Section, wanted: frozenset[str], limit: int) -> Iterator[tuple[int, Row | str]]:
    """What leads to a code block asks, the block answers."""
    lead = ""
    for part in section.body:
        if isinstance(part, Text):
            lead = part.text
            continue
        reason = _unfit(part, wanted, limit)
        asks = "\n\n".join(text for text in (section.path, lead) if text)
        if reason or not asks:
            yield part.line, reason or "code without a heading or text in front of it"
        else:
            fence = _fence(part.text)
            prompt, completion = f"{asks}\n\n{fence}{part.language}\n", f"{part.text}\n{fence}"
            yield part.line, Row({"prompt": prompt, "completion": completion}, group=part.text)
        lead = ""


def _unfit(code: Code, wanted: frozenset[str], limit: int) -> str:
    """Why a code block makes no row, or nothing."""
    if not code.text.strip():
        return "code without a letter"
    if wanted and code.language not in wanted:
        return (
            f"code in {code.language or 'no language that the page says'}, wanted {listing(sorted(wanted))}"
        )
    return f"{len(code.text)} characters of code, the limit is {limit}" if len(code.text) > limit else ""


def _shown(part: Text | Code) -> str:
    """A part as Markdown has it."""
    if isinstance(part, Text):
        return part.text
    fence = _fence(part.text)
    return f"{fence}{part.language}\n{part.text}\n{fence}"


def _fence(code: str) -> str:
    """Marks that do not stand at the start of a line of the code."""
    return "`" * max([3, *(len(marks) + 1 for marks in _FENCE.findall(code))])
