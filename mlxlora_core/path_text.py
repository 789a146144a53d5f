"""Paths as texts that every file can hold, such as a recipe, whatever bytes they are made of."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes


def path_text(path: Path) -> str:
    """A path as a text that every file can hold: one that is no UTF-8 as a ``file://`` address."""
    text = str(path)
    return text if _is_unicode(text) else path.absolute().as_uri()


def text_path(text: str) -> Path:
    """The path that :func:`path_text` told."""
    if not text.startswith("file:///"):
        return Path(text)
    return Path(os.fsdecode(unquote_to_bytes(text.removeprefix("file://"))))


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: bytes of a file name that are none come as halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
