"""Markdown -> parts, by CommonMark (markdown-it-py); prose stays as it is written."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token

from mlxlora_manuals.parts import Code, Heading, Left, Part, Text

_FRONT = re.compile(r"---[ \t]*\n.*?^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_CODE = ("fence", "code_block")
_MYST = re.compile(r"\{(?:code|code-block|code-cell|sourcecode)\}\s*(\S*)")


def parts(text: str) -> Iterator[Part]:
    """The parts of a page, in their order."""
    front = _FRONT.match(text)
    if front:
        yield Left(1, "front matter")
        text = "\n" * front[0].count("\n") + text[front.end() :]  # so that lines keep their numbers
    lines = text.split("\n")
    for block in _blocks(MarkdownIt("commonmark").enable("table").parse(text)):
        yield from _parts_of(block, lines)


def _blocks(tokens: list[Token]) -> Iterator[list[Token]]:
    """The tokens of each block that is in no other."""
    block: list[Token] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def _parts_of(block: list[Token], lines: list[str]) -> Iterator[Part]:
    first = block[0]
    start, end = first.map or (0, 0)
    if first.type == "heading_open":
        yield Heading(start + 1, int(first.tag[1:]), _plain(block[1]))
    elif first.type == "html_block" and first.content.lstrip().startswith("<!--"):
        yield Left(start + 1, "a comment")
    elif first.type != "hr":
        yield from _with_code(block, lines, start, end)


def _with_code(block: list[Token], lines: list[str], start: int, end: int) -> Iterator[Part]:
    """The code blocks in a block, at any depth, and the lines between them."""
    for token in block:
        if token.type in _CODE and token.map:
            first, behind = token.map
            yield from _prose(lines, start, first)
            yield Code(first + 1, _language(token.info), token.content.rstrip("\n"))
            start = behind
    yield from _prose(lines, start, end)


def _prose(lines: list[str], start: int, end: int) -> Iterator[Text]:
    text = textwrap.dedent("\n".join(lines[start:end])).strip("\n")
    if text.strip():
        yield Text(start + 1, text.rstrip())


def _language(info: str) -> str:
    """What an info string says: its first word, or what stands behind a directive of MyST."""
    words = info.split()
    myst = _MYST.match(info.strip())
    return (myst[1] if myst else words[0] if words else "").lower()


def _plain(inline: Token) -> str:
    """The letters of a heading, without its marks."""
    breaks = ("softbreak", "hardbreak")
    children = inline.children or []
    return "".join(" " if child.type in breaks else child.content for child in children).strip()
