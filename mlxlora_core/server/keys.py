"""API keys in a file."""

from __future__ import annotations

from pathlib import Path

from mlxlora_core.errors import UsageError
from mlxlora_core.files.input_file import read_whole

_MOST_BYTES = 64 << 10
_LEAST_LETTERS = 16


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and those that begin with ``#`` are none.

    Raises:
        UsageError: there is no key, or one that is too short or cannot stand in a header.
    """
    text = read_whole(path, _MOST_BYTES, UsageError).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError("holds no API key", where=path, fix="write one a line: openssl rand -hex 32")
    for number, key in enumerate(keys, 1):
        if len(key) < _LEAST_LETTERS or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(
                f"key {number} is none: wanted {_LEAST_LETTERS} ASCII characters or more, without spaces",
                where=path,
                fix="openssl rand -hex 32",
            )
    return keys
