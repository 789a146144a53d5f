"""The errors that mlxlora raises on purpose, and the exit code of each.

::

    MlxloraError
    ├── UsageError      2  usage and configuration
    ├── DataError       3  rows and datasets
    ├── ModelError      4  model, adapter and tokenizer
    ├── SafetyError     5  refused for safety
    ├── ResourceError   6  disk, memory and limits
    ├── DivergedError   7  a loss, a gradient or logits that are not finite
    ├── PluginError     8  a plugin is missing, broken or incompatible
    ├── LockedError     9  another run holds the folder
    └── RankError      10  another rank of the same training is lost, or differs from this one

Anything else that reaches the command line is a defect of mlxlora (70); a
signal n ends a run with 128 + n.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path

LINE_BYTES = 1900  # of an error on the screen, at most
_GAP = " \u2026 "


class ExitCode(IntEnum):
    """What the process tells its caller."""

    OK = 0
    USAGE = 2
    DATA = 3
    MODEL = 4
    SAFETY = 5
    RESOURCE = 6
    DIVERGED = 7
    PLUGIN = 8
    LOCKED = 9
    RANK = 10
    DEFECT = 70


class MlxloraError(Exception):
    """An expected failure: what happened, where, and what to do about it.

    Args:
        what: the fault with what was found and what was wanted.
        where: the file, ``file:line`` or option that it was found in.
        fix: what the user can do, as an imperative.
    """

    exit_code = ExitCode.DEFECT

    def __init__(self, what: str, *, where: str | Path = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f". Fix: {self.fix}" if self.fix else ""
        return bounded(place, self.what, remedy)


class UsageError(MlxloraError):
    """A command line, recipe or option that makes no sense."""

    exit_code = ExitCode.USAGE


class DataError(MlxloraError):
    """Rows that cannot be read or used."""

    exit_code = ExitCode.DATA


class ModelError(MlxloraError):
    """A checkpoint, model folder, adapter file or tokenizer that does not fit."""

    exit_code = ExitCode.MODEL


class SafetyError(MlxloraError):
    """Something that was refused because doing it could cause harm."""

    exit_code = ExitCode.SAFETY


class ResourceError(MlxloraError):
    """Disk, memory or another limit of the machine."""

    exit_code = ExitCode.RESOURCE


class DivergedError(MlxloraError):
    """A loss, a gradient or logits that are not finite."""

    exit_code = ExitCode.DIVERGED


class PluginError(MlxloraError):
    """A plugin that is missing, broken or incompatible."""

    exit_code = ExitCode.PLUGIN


class LockedError(MlxloraError):
    """Another run holds the folder."""

    exit_code = ExitCode.LOCKED


class RankError(MlxloraError):
    """Another rank of the same training that is lost, has failed, or differs from this one."""

    exit_code = ExitCode.RANK


def one_line(text: object) -> str:
    """``text`` on one line, with every control character escaped.

    Names out of foreign files are printed through this, so that none of them
    can move the cursor, clear the screen or forge a second message.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def bounded(*parts: object) -> str:
    """Texts one after another on one line as :func:`one_line`, within :data:`LINE_BYTES` in UTF-8.

    Where they are longer together, the longest lose their middle: a name of a
    megabyte hides neither the file that it stands in nor what to do.
    """
    # Nothing is escaped that is cut off anyway.
    lines = [one_line(_ends(str(part), 2 * LINE_BYTES)) for part in parts]
    sizes = [len(line.encode()) for line in lines]
    left, room = LINE_BYTES, LINE_BYTES
    for rest, size in zip(range(len(sizes), 0, -1), sorted(sizes), strict=True):
        room = left // rest  # what each of those that are still left may have
        left -= min(size, room)
    return "".join(line if len(line.encode()) <= room else _cut(line, room) for line in lines)


def _ends(text: str, letters: int) -> str:
    """``text`` without its middle, where it has more than ``letters``."""
    return text if len(text) <= letters else f"{text[: letters // 2]}{_GAP}{text[-letters // 2 :]}"


def _cut(line: str, size: int) -> str:
    """The start of ``line`` and its end, in ``size`` bytes."""
    data, kept = line.encode(), size - len(_GAP.encode())
    start, end = data[: kept * 2 // 3], data[-(kept // 3) :]
    return start.decode(errors="ignore") + _GAP + end.decode(errors="ignore")


def short(text: object, letters: int) -> str:
    """A text as it is, or the start of one that is longer than ``letters``."""
    text = str(text)
    return text if len(text) <= letters else text[: letters - 1] + "\u2026"


def listing(items: Iterable[object], limit: int = 10) -> str:
    """``a, b, c and 7 more``: at most ``limit`` items of a list, and the count of the rest."""
    shown = [str(item) for item in items]
    if not shown:
        return "none"
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'rank'? `` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{close[0]}'? " if close else ""


class SettingsChanged(UsageError):
    """A training that was begun with other settings.

    Attributes:
        rows: (name, old value, new value) of each that differs.
    """

    def __init__(self, rows: Sequence[tuple[str, str, str]], where: Path, fix: str) -> None:
        self.rows = rows
        changes = listing((f"{name} {old} -> {new}" for name, old, new in rows), 20)
        super().__init__(f"the training was begun with other settings: {changes}", where=where, fix=fix)
