"""The questions of earlier conversations, in a file that only their author can read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mlxlora_core.files.durable import append_line, write_text

KEPT = 1000  # questions that are brought back
_MODE = 0o600
_BYTES = 1 << 20  # beyond which a file is written anew with those that are kept


def place_of(environ: Mapping[str, str]) -> Path:
    """Where the file is, by the XDG base directory specification: a path that is not absolute is none."""
    given = environ.get("XDG_STATE_HOME", "")
    state = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~"), ".local", "state")
    return state / "mlxlora" / "chat_history"


class HistoryFile:
    """A file of texts, each a JSON string on a line.

    Args:
        path: of the file; it is made, with its folder, by the first text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> list[str]:
        """The last texts, oldest first; lines that hold none are passed over.

        Raises:
            OSError: the file is there and cannot be read.
            ResourceError: it is too long, and cannot be written anew.
        """
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines[-KEPT:]:
            with suppress(ValueError, RecursionError):
                text = json.loads(line)
                if isinstance(text, str):
                    found.append(text)
        if sum(map(len, lines)) > _BYTES:
            write_text(self.path, "".join(json.dumps(text) + "\n" for text in found))
        return found

    def add(self, text: str) -> None:
        """Put a text behind the others.

        Raises:
            OSError: the file cannot be made.
            ResourceError: it cannot be written.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.touch(_MODE)
        self.path.chmod(_MODE)  # also of a file that was there
        append_line(self.path, json.dumps(text))
