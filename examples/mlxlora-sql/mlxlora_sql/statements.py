"""SQL as far as it has to be understood: where a statement ends, and whether it says an order."""

from __future__ import annotations

import re
from collections.abc import Iterator

# https://sqlite.org/lang_comment.html and lang_keywords.html: texts, names and comments hide what is in them.
_TOKEN = re.compile(
    r"""(?P<hidden>--[^\n]*|/\*.*?(?:\*/|\Z)|'(?:[^']|'')*(?:'|\Z)|"(?:[^"]|"")*(?:"|\Z)|`[^`]*(?:`|\Z)|\[[^\]]*(?:\]|\Z))
    |(?P<word>\w+)|(?P<mark>[^\s])""",
    re.VERBOSE | re.DOTALL,
)
_FENCED = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def first_statement(text: str) -> str:
    """The first statement of an answer: of its first fenced block, if there is one; without its semicolon."""
    fenced = _FENCED.search(text)
    sql = fenced[1] if fenced else text
    end = next((place for place, token in _tokens(sql) if token == ";"), len(sql))
    return sql[:end].strip()


def is_ordered(statement: str) -> bool:
    """Whether the rows of a query have an order: ORDER BY outside of all brackets."""
    depth, before = 0, ""
    for _, token in _tokens(statement):
        depth += (token == "(") - (token == ")")
        if depth == 0 and before == "ORDER" and token == "BY":
            return True
        before = token
    return False


def _tokens(sql: str) -> Iterator[tuple[int, str]]:
    """(place, token) of the words, in capitals, and marks that are in no text, name or comment."""
    for match in _TOKEN.finditer(sql):
        if match["hidden"] is None:
            yield match.start(), match[0].upper()
