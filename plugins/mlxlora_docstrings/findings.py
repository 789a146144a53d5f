"""What a child process finds in a package, written to a file for its parent.

The file holds one JSON list a line::

    ["at", place, seconds]      work on a module or a class begins, so long after the start
    ["row", path, docstring]
    ["skip", source, reason]
    ["done"]                    the last line, if the child lived to write it
"""

from __future__ import annotations

import json
import re
import time
from typing import TextIO

from mlxlora_docstrings.graph import is_public_path

# What a process writes of itself: <object at 0x7f3a5c0e1d50>, and anything that may be a pointer.
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{8,}")
_REASON_CHARACTERS = 200


class Findings:
    """Writes what was found; nothing that changes from run to run gets through.

    Args:
        file: where to write.
        seq_limit: longest docstring in characters.
        folder: the temporary folder that the child lives in.
    """

    def __init__(self, file: TextIO, seq_limit: int, folder: str) -> None:
        self._file, self._seq_limit, self._folder = file, seq_limit, folder
        self._docs: set[str] = set()
        self._start = time.monotonic()

    def at(self, place: str) -> None:
        """Work on ``place`` begins: should the process die now, that is the culprit."""
        self._write("at", place, time.monotonic() - self._start)
        self._file.flush()

    def row(self, path: str, doc: str) -> None:
        """One documented object, or why its docstring cannot be used.

        Best paths come first. What has none but a private path and says what a
        public one has said is no news: the C function under a public one, mostly.
        """
        if not is_public_path(path) and doc in self._docs:
            return
        self._docs.add(doc)
        fault = self._fault(doc)
        if fault:
            self._write("skip", path, f"its docstring {fault}")
        else:
            self._write("row", path, doc)

    def skip(self, source: str, fault: BaseException | str) -> None:
        """``source`` was left out because of ``fault``."""
        self._write("skip", source, self._reason(fault))

    def done(self) -> None:
        """Everything was read."""
        self._write("done")
        self._file.flush()

    def _write(self, *record: str | float) -> None:
        self._file.write(json.dumps(record) + "\n")

    def _fault(self, doc: str) -> str:
        if len(doc) > self._seq_limit:
            return f"has {len(doc)} characters, the limit is {self._seq_limit}"
        if _ADDRESS.search(doc):
            return "holds what may be a memory address"
        if self._folder in doc:
            return "holds the path of a temporary folder"
        if any("\ud800" <= letter <= "\udfff" for letter in doc):
            return "holds half a surrogate pair"
        return ""

    def _reason(self, fault: BaseException | str) -> str:
        if isinstance(fault, SystemExit):
            return "it called sys.exit"
        try:
            text = fault if isinstance(fault, str) else f"{type(fault).__name__}: {fault}".rstrip(": ")
        except BaseException:
            text = type(fault).__name__
        text = _ADDRESS.sub("at 0x...", text.replace(self._folder, "<temporary folder>"))
        text = " ".join(text.split())
        return text if len(text) <= _REASON_CHARACTERS else text[: _REASON_CHARACTERS - 3] + "..."
