"""Rows in JSON Lines: one JSON object a line, UTF-8, read with every fault told by file and line.

It knows nothing of tokens or splits. A row is one of ``{text}``,
``{prompt, completion}`` and ``{messages: [{role, content}, ...]}``; other keys
of a row are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from mlxlora_core.errors import DataError, listing
from mlxlora_core.files.input_file import open_regular

LINE_BYTES = 16 << 20  # the longest line that is read
FAULTS_TOLD = 5  # bad lines of all files that an error names

_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
# The first bytes of files that are no UTF-8 text, and what they are; the longest first.
_FOREIGN = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"{\x00", "UTF-16LE"),
    (b"\x00{", "UTF-16BE"),
    (b"\x1f\x8b", "gzip"),
)
_SHAPES = (("text",), ("prompt", "completion"), ("messages",))
_WANTED = "text, or prompt and completion, or messages"
_ONE_A_LINE = "wanted one object a line (jq -c . makes them)"
_KEY_LETTERS = 40  # so much of a key is told


@dataclass(frozen=True)
class JsonLines:
    """What one file holds.

    Attributes:
        rows: (line number, content) of the good lines; content has the keys of its shape and no other.
        blank_lines: how many lines had nothing on them.
        faults: ``file:line: fault`` of the first bad lines.
        fault_count: how many bad lines there are.
    """

    rows: list[tuple[int, dict[str, Any]]]
    blank_lines: int
    faults: list[str]
    fault_count: int


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, content) of every row of a file.

    Raises:
        DataError: the file cannot be read, has a bad line (the first are told, with
            the count of all), or has no row.
    """
    lines = scan_jsonl(path)
    refuse_faults([lines])
    if not lines.rows:
        blank = f" but {lines.blank_lines} blank lines" if lines.blank_lines else ""
        raise DataError(f"there is no row in it{blank}", where=path)
    return lines.rows


def scan_jsonl(path: Path) -> JsonLines:
    """All rows and all faults of a file.

    Raises:
        DataError: it is missing, no regular file, unreadable, or no UTF-8 text.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    faults: list[str] = []
    blank = fault_count = 0
    with _open(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if not line:
                blank += 1
                continue
            content, fault = _parse(line)
            if not fault:
                rows.append((number, content))
                continue
            fault_count += 1
            if len(faults) < FAULTS_TOLD:
                faults.append(f"{path}:{number}: {fault}")
    return JsonLines(rows, blank, faults, fault_count)


def refuse_faults(files: Iterable[JsonLines]) -> None:
    """Raise one DataError that names the first bad lines of all ``files`` and how many there are."""
    files = list(files)
    count = sum(lines.fault_count for lines in files)
    if count:
        told = [fault for lines in files for fault in lines.faults][:FAULTS_TOLD]
        rest = f"; and {count - len(told)} more" if count > len(told) else ""
        total = "1 bad line" if count == 1 else f"{count} bad lines"
        raise DataError(f"{total}: {'; '.join(told)}{rest}")


def check_content(content: object) -> str | None:
    """Why ``content`` is no row, or None when it is one."""
    if not isinstance(content, dict):
        return f"is {_kind(content)}, wanted an object with {_WANTED}"
    shapes = [keys for keys in _SHAPES if content.keys() >= {*keys}]
    if not shapes:
        return f"needs {_WANTED}; it has {_keys(content)}"
    if len(shapes) > 1:
        return f"has {' and '.join('/'.join(keys) for keys in shapes)}, wanted only one of these"
    if shapes == [("messages",)]:
        return _check_messages(content["messages"])
    return next((fault for key in shapes[0] if (fault := _check_text(key, content[key]))), None)


def _check_messages(messages: object) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"messages is {_kind(messages)}, wanted a list of at least one {{role, content}}"
    for place, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {place} is {_kind(message)}, wanted {{role, content}}"
        for key in ("role", "content"):
            if key not in message:
                return f"message {place} has no {key}; it has {_keys(message)}"
            if fault := _check_text(f"{key} of message {place}", message[key]):
                return fault
    return None


def _check_text(name: str, text: object) -> str | None:
    if not isinstance(text, str):
        return f"{name} is {_kind(text)}, wanted a string"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            return f"{name} holds half a surrogate pair ({text[fault.start]!r}), which is no character"
    return None


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    """The file, read up to its first line."""
    with open_regular(path, DataError) as file:
        try:
            _pass_mark(file, path)
            yield file
        except OSError as fault:
            raise DataError(f"cannot be read: {fault.strerror}", where=path) from fault


def _pass_mark(file: BufferedReader, path: Path) -> None:
    """Go past a UTF-8 byte order mark, and refuse what is no UTF-8 text by its first bytes."""
    start = file.peek(4)
    for mark, encoding in _FOREIGN:
        if start.startswith(mark):
            fix = "gunzip it" if encoding == "gzip" else f"iconv -f {encoding} -t UTF-8"
            raise DataError(f"is {encoding}, wanted UTF-8 text", where=path, fix=fix)
    if start.startswith(_BOM):
        file.seek(len(_BOM))


def _lines(file: BufferedReader) -> Iterator[bytes]:
    """The lines without the white space around them; one too long comes cut, a byte above the limit.

    A line ends with a line feed and nothing else: U+2028 may stand in a string.
    """
    while line := file.readline(LINE_BYTES + 1):
        yield line.strip(_BLANK) if len(line) <= LINE_BYTES else line
        while len(line) > LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES + 1)


def _parse(line: bytes) -> tuple[dict[str, Any], str]:
    """The content of one line, or what is wrong with it."""
    if len(line) > LINE_BYTES:
        return {}, f"is longer than {LINE_BYTES >> 20} MiB"
    try:
        value = _DECODER.decode(line.decode())
    except UnicodeDecodeError as fault:
        return {}, f"byte 0x{line[fault.start]:02x} at byte {fault.start + 1} is not UTF-8"
    except json.JSONDecodeError as fault:
        return {}, _syntax(line, fault)
    except RecursionError:
        return {}, "is nested too deeply"
    except ValueError as fault:  # a key twice, NaN, a number with thousands of digits
        return {}, str(fault)
    if isinstance(value, list):
        return {}, "is an array, wanted one object a line (jq -c '.[]' makes them)"
    wrong = check_content(value)
    return ({}, wrong) if wrong else (_kept(value), "")


def _syntax(line: bytes, fault: json.JSONDecodeError) -> str:
    """What is wrong with a line that is no JSON."""
    if fault.msg == "Extra data":
        return f"has more than one JSON value (the second at column {fault.colno}), {_ONE_A_LINE}"
    if line in (b"{", b"[", b"[{"):
        return f"opens what is not closed on it, {_ONE_A_LINE}"
    return f"no JSON: {fault.msg} at column {fault.colno}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that it has twice is a fault, since one of the values would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"has the key {_short(twice)} twice")
    return content


def _constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _kept(content: Mapping[str, Any]) -> dict[str, Any]:
    """A checked row without the keys that nobody reads."""
    if "messages" in content:
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in content["messages"]]}
    return {key: content[key] for key in (_SHAPES[0] if "text" in content else _SHAPES[1])}


def _kind(value: object) -> str:
    """The JSON type of a value, as one would say it."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object") if value != [] else "an empty list"


def _keys(content: Mapping[str, Any]) -> str:
    return "the keys " + listing(map(_short, content)) if content else "no keys"


def _short(key: str) -> str:
    return key if len(key) <= _KEY_LETTERS else key[:_KEY_LETTERS] + "..."
