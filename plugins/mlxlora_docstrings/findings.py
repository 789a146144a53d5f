"""What a child process finds in a package, written to a pipe for its parent.

One record a line, its fields JSON strings with a tab between them, so that
nothing in it can be deep or of another type::

    "pid"  number               the child lives, and leads a process group of that number
    "at"   place                work on a module or a class begins
    "row"  path  docstring
    "skip" source  reason         of a module, a class, an object or ``*``, whatever else is in one
    "done"                      the last line, if the child lived to write it

The package runs in the same process and may write what it likes: what comes
back is believed only as far as :func:`decode` lets it through.
"""

from __future__ import annotations

import json
import re
from typing import IO

from mlxlora_docstrings.graph import is_public_path

REASON_CHARACTERS = 200

# What a process writes of itself: <object at 0x7f3a5c0e1d50>, and anything that may be a pointer.
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{8,}")
_FIELDS = {"pid": 2, "at": 2, "row": 3, "skip": 3, "done": 1}
_PLACE_BYTES = 1 << 16  # of a path of twelve names, each of the longest, in escapes


class Findings:
    """Writes what was found; nothing that changes from run to run gets through.

    Args:
        file: where to write.
        seq_limit: longest docstring in characters.
        folder: the temporary folder that the child lives in.
    """

    def __init__(self, file: IO[bytes], seq_limit: int, folder: str) -> None:
        self._file, self._seq_limit, self._folder = file, seq_limit, folder
        self._docs: set[str] = set()
        self._skipped: set[str] = set()

    def begin(self, pid: int) -> None:
        """The child is ``pid``, and no line of the package has run."""
        self._write("pid", str(pid))
        self._file.flush()

    def at(self, place: str) -> None:
        """Work on ``place`` begins: should the process die now, that is the culprit."""
        self._write("at", place)
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
        """``source`` was left out because of ``fault``; the first reason stands."""
        if source not in self._skipped:
            self._skipped.add(source)
            self._write("skip", source, self._reason(fault))

    def done(self) -> None:
        """Everything was read."""
        self._write("done")
        self._file.flush()

    def _write(self, *record: str) -> None:
        self._file.write("\t".join(map(json.dumps, record)).encode("ascii") + b"\n")

    def _fault(self, doc: str) -> str:
        if len(doc) > self._seq_limit:
            return f"has {len(doc)} characters, the limit is {self._seq_limit}"
        if _ADDRESS.search(doc):
            return "holds what may be a memory address"
        if self._folder in doc:
            return "holds the path of a temporary folder"
        if not _is_text(doc):
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
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        text = " ".join(text.split())
        return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 3] + "..."


def line_bytes(seq_limit: int) -> int:
    """The most that one record takes: a letter is up to 12 bytes in escapes."""
    return 2 * _PLACE_BYTES + 12 * max(seq_limit, REASON_CHARACTERS)


def decode(line: bytes, package: str, seq_limit: int) -> list[str]:
    """The fields of a record.

    Args:
        line: without its line feed.
        package: what the child was told to read; no record speaks of anything outside.
        seq_limit: longest docstring in characters.

    Raises:
        ValueError: no child of ours writes this.
    """
    texts = line.decode("ascii").split("\t")
    if not all(text.startswith('"') for text in texts):
        raise ValueError("a field is no string")
    record: list[str] = [json.loads(text) for text in texts]
    kind = record[0]
    if _FIELDS.get(kind) != len(record):
        raise ValueError("no kind of record")
    if kind == "pid" and not (record[1].isdecimal() and 1 < int(record[1][:20]) < 1 << 31):
        raise ValueError("no process")
    if kind in ("at", "row", "skip"):
        within = package if kind == "row" else package.partition(".")[0]  # a part imports others
        if not _is_inside(record[1].removesuffix(".*"), within):
            raise ValueError("another package's")
    if kind == "row" and not (_is_text(record[2]) and len(record[2]) <= seq_limit):
        raise ValueError("no docstring")
    if kind == "skip" and not (record[2].isprintable() and len(record[2]) <= REASON_CHARACTERS):
        raise ValueError("no reason")
    return record


def _is_inside(path: str, package: str) -> bool:
    """Whether a path is of names, and of the package or in it."""
    return f"{path}.".startswith(f"{package}.") and all(map(str.isidentifier, path.split(".")))


def _is_text(text: str) -> bool:
    """Whether UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
