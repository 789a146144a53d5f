"""JSON in files of rows: one value a line, or one array; every fault is told by its line.

It knows nothing of what a row is, see :mod:`mlxlora_core.files.row_shapes`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

LINE_BYTES = 16 << 20  # the longest line that is read
WHOLE_BYTES = 1 << 30  # the largest file that is read whole

_BLANK = b" \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")
_ONE_A_LINE = "wanted one object a line"
_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps makes one each time
_KEY_LETTERS = 40  # so much of a key is told


@dataclass(frozen=True)
class Record:
    """What stands at one place of a file.

    Attributes:
        line: where it begins, from 1.
        value: what it holds; nothing where there is a fault.
        fault: what is wrong with it.
        blank: whether there is nothing there.
    """

    line: int
    value: Any = None
    fault: str = ""
    blank: bool = False


class _Decoder(json.JSONDecoder):
    """A decoder that notes what JSON allows or Python does, though something would be lost by it.

    Attributes:
        noted: what was wrong with the values decoded since it was cleared.
    """

    def __init__(self) -> None:
        self.noted: list[str] = []
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object; of a key that it has twice, one of the values would be lost."""
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            self.noted.append(f"has the key {short(twice)} twice")
        return content

    def _constant(self, name: str) -> None:
        self.noted.append(f"holds {name}, which is no JSON")


def read_lines(file: BufferedReader) -> Iterator[Record]:
    """Each line of JSON Lines; a file that is pretty-printed is told once and not line by line."""
    start, first, decoder = file.tell(), True, _Decoder()
    for number, line in enumerate(_lines(file), 1):
        if not line:
            yield Record(number, blank=True)
            continue
        record = _parse(number, line, decoder)
        if first and record.fault and line[:1] in b"[{":
            after = file.tell()
            file.seek(start)
            if pretty := _pretty(file.read(WHOLE_BYTES)):
                yield Record(number, fault=pretty)
                return
            file.seek(after)
        first = False
        yield record


def line_of(value: Any) -> bytes:
    """A value of JSON as a line, with its end.

    Raises:
        ValueError: nobody would read so long a line.
    """
    line = _ENCODER.encode(value).encode() + b"\n"
    if len(line) > LINE_BYTES:
        raise ValueError(_too_long())
    return line


def begins_array(file: BufferedReader) -> bool:
    """Whether the first thing in a file is the bracket of an array."""
    start, begin = file.tell(), b""
    while not begin and (part := file.read(1 << 16)):
        begin = part.lstrip(_BLANK)[:1]
    file.seek(start)
    return begin == b"["


def read_text(file: BufferedReader) -> tuple[str, Record | None]:
    """The rest of a file as text, or else what is wrong with it."""
    data = file.read(WHOLE_BYTES + 1)
    if len(data) > WHOLE_BYTES:
        return "", Record(1, fault=f"is larger than {WHOLE_BYTES >> 30} GiB, wanted JSON Lines at that size")
    try:
        return data.decode(), None
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        column = fault.start - data.rfind(b"\n", 0, fault.start)
        return "", Record(line, fault=_bad_byte(data[fault.start], column))


def read_array(file: BufferedReader) -> Iterator[Record]:
    """Each element of the one array in a file; what is no JSON ends it, since nothing after it is sure."""
    text, unreadable = read_text(file)
    if unreadable is not None:
        yield unreadable
        return
    decoder, scan = _Decoder(), _Scan(text)
    scan.skip(1 + text.index("["))
    if scan.letter != "]":
        while True:
            line, begin = scan.line, scan.place
            decoder.noted.clear()
            try:
                value, end = decoder.raw_decode(text, begin)
            except (json.JSONDecodeError, RecursionError, ValueError) as fault:
                yield _no_element(fault, scan)
                return
            yield Record(line, value, "".join(decoder.noted[:1]))
            scan.skip(end)
            if scan.letter != ",":
                break
            scan.skip(scan.place + 1)
    if scan.letter != "]":
        yield Record(scan.line, fault=f"no JSON: Expecting ',' or ']' at column {scan.column}")
        return
    scan.skip(scan.place + 1)
    if scan.letter:
        yield Record(scan.line, fault=f"has more behind the end of the array, at column {scan.column}")


class _Scan:
    """A place in a text, with its line counted along.

    Attributes:
        place: where it stands.
        line: of that place, from 1.
    """

    def __init__(self, text: str) -> None:
        self._text, self.place, self.line = text, 0, 1

    @property
    def letter(self) -> str:
        """What stands there; nothing at the end."""
        return self._text[self.place : self.place + 1]

    @property
    def column(self) -> int:
        """Of that place, from 1."""
        return self.place - self._text.rfind("\n", 0, self.place)

    def skip(self, place: int) -> None:
        """Go on to ``place``, and over the white space behind it."""
        space = _SPACE.match(self._text, place)
        end = space.end() if space else place
        self.line += self._text.count("\n", self.place, end)
        self.place = end


def _no_element(fault: Exception, scan: _Scan) -> Record:
    """What is wrong where an array goes on with no value."""
    if isinstance(fault, json.JSONDecodeError):
        lines = fault.doc.count("\n", scan.place, fault.pos)
        return Record(scan.line + lines, fault=f"no JSON: {fault.msg} at column {fault.colno}")
    deep = isinstance(fault, RecursionError)
    return Record(scan.line, fault="is nested too deeply" if deep else str(fault))


def _lines(file: BufferedReader) -> Iterator[bytes]:
    """The lines without the white space around them; one too long comes cut, a byte above the limit.

    A line ends with a line feed and nothing else: U+2028 may stand in a string.
    """
    while line := file.readline(LINE_BYTES + 1):
        yield line.strip(_BLANK) if len(line) <= LINE_BYTES else line
        while len(line) > LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES + 1)


def _parse(number: int, line: bytes, decoder: _Decoder) -> Record:
    """One line, or what is wrong with it."""
    decoder.noted.clear()
    if len(line) > LINE_BYTES:
        return Record(number, fault=_too_long())
    try:
        value = decoder.decode(line.decode())
    except UnicodeDecodeError as fault:
        return Record(number, fault=_bad_byte(line[fault.start], fault.start + 1))
    except json.JSONDecodeError as fault:
        return Record(number, fault=_syntax(line, fault))
    except RecursionError:
        return Record(number, fault="is nested too deeply")
    except ValueError as fault:  # a number with thousands of digits
        return Record(number, fault=str(fault))
    if decoder.noted:
        return Record(number, fault=decoder.noted[0])
    if isinstance(value, list):
        return Record(number, fault=f"is an array, {_ONE_A_LINE} (jq -c '.[]' makes them)")
    return Record(number, value)


def _pretty(data: bytes) -> str:
    """What a file is that goes on with one value over several lines; nothing for any other."""
    try:
        text = data.decode().lstrip()
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""
    what, query = ("array", ".[]") if isinstance(value, list) else ("object", ".")
    if "\n" not in text[:end] or (what == "array" and text[end:].strip()):
        return ""
    name = "; or name the file .json" if what == "array" else ""
    return f"is one JSON {what} over several lines, {_ONE_A_LINE} (jq -c '{query}' makes them{name})"


def _syntax(line: bytes, fault: json.JSONDecodeError) -> str:
    """What is wrong with a line that is no JSON."""
    if fault.msg == "Extra data":
        if line.endswith(b",") and fault.colno == len(fault.doc):
            return f"has a comma behind the value, {_ONE_A_LINE} and no more"
        second = f"the second at column {fault.colno}"
        return f"has more than one JSON value ({second}), {_ONE_A_LINE} (jq -c . makes them)"
    if line in (b"{", b"[", b"[{"):
        return f"opens what is not closed on it, {_ONE_A_LINE} (jq -c . makes them)"
    return f"no JSON: {fault.msg} at column {fault.colno}"


def _too_long() -> str:
    return f"is longer than {LINE_BYTES >> 20} MiB"


def _bad_byte(byte: int, column: int) -> str:
    return f"byte 0x{byte:02x} at byte {column} is not UTF-8"


def short(key: str) -> str:
    """So much of a key that a message stays short."""
    return key if len(key) <= _KEY_LETTERS else key[:_KEY_LETTERS] + "..."
