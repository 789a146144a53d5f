"""What a page is made of, whatever it is written in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """The title of what follows; level 1 is the highest."""

    line: int
    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """Paragraphs, lists and the like, as plain text."""

    line: int
    text: str


@dataclass(frozen=True)
class Code:
    """A code block; its language is empty where the page does not say it."""

    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Left:
    """What makes no part of a row, and why."""

    line: int
    reason: str


Part = Heading | Text | Code | Left
