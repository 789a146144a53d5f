"""Paths as texts: those that the system takes, and those that every file can hold, such as a recipe."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from urllib.parse import unquote_to_bytes

from mlxlora_core.errors import UsageError, short

_SHOWN_LETTERS = 80  # so much of a wrong path is told


def check_path(text: str) -> None:
    """Refuse what can be the name of nothing here, whatever there is.

    Raises:
        ValueError: it is empty, has a zero byte, or is longer than the system takes.
    """
    why = ""
    if text and "\0" not in text:
        # Each name by itself too: in a folder that is not there yet, the system looks at none.
        faults = [fault for name in (text, *Path(text).parts) if (fault := _length_fault(name))]
        if not faults:
            return
        why = f" ({faults[0]})"
    raise ValueError(f"wanted a path, got {short(text, _SHOWN_LETTERS)!r}{why}")


def _length_fault(path: str) -> str:
    """What the system says of a path that is too long for it, or nothing."""
    try:
        os.lstat(path)
    except OSError as fault:  # what is absent is told by whoever reads it
        return str(fault.strerror) if fault.errno == errno.ENAMETOOLONG else ""
    return ""


def too_long(fault: OSError, where: str | Path) -> UsageError | None:
    """The error that a path which is too long is for whoever gave it; None for any other fault."""
    if fault.errno != errno.ENAMETOOLONG:
        return None
    return UsageError(str(fault.strerror), where=where, fix="choose a shorter name")


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
