"""Rows in files of any format: what is read, and what every fault is called."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DataError, ExitCode
from mlxlora_core.files import jsonl
from mlxlora_core.files.rows import left_out, read_rows, refuse_faults, scan_rows

A, B = {"text": "a"}, {"text": "b"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(data: bytes | str) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return write


def contents(path: Path) -> list[dict[str, Any]]:
    return [content for _, content in read_rows(path)]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.exit_code == ExitCode.DATA
    text = str(caught.value)
    assert text.count(str(path)) >= 1
    assert "\n" not in text
    return text.replace(str(path), "FILE")


# --- what is read -------------------------------------------------------------


def test_the_three_shapes_with_their_line_numbers(write: Any) -> None:
    pair = {"prompt": "p", "completion": ""}
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    rows = [A, pair, talk]
    assert read_rows(write("\n".join(map(json.dumps, rows)))) == [(1, A), (2, pair), (3, talk)]


def test_keys_that_nobody_reads_are_left_out(write: Any) -> None:
    said = [{"role": "user", "content": "c", "name": "n"}, {"role": "assistant", "content": "d"}]
    rows = [{"id": 1, **A, "prompt": "half of a pair"}, {"messages": said, "source": None}]
    found = scan_rows(write("\n".join(map(json.dumps, rows))))
    said[0].pop("name")
    assert [content for _, content in found.rows] == [A, {"messages": said}]
    assert found.unread == {"id": 1, "prompt": 1, "name of messages": 1}
    assert list(left_out(found)) == [
        "keys that are not read: id (1 row), prompt (1 row), name of messages (1 row)"
    ]


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\n{"text": "b"}',
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b' {"text": "a"}\t\n{"text": "b"} \r\n',
    ],
    ids=["plain", "no final newline", "byte order mark", "CRLF", "white space"],
)
def test_how_lines_end_makes_no_difference(write: Any, data: bytes) -> None:
    assert read_rows(write(data)) == [(1, A), (2, B)]


def test_blank_lines_are_passed_over_and_counted(write: Any) -> None:
    lines = scan_rows(write('\n{"text": "a"}\n  \t\r\n\r\n{"text": "b"}\n\n'))
    assert (lines.rows, lines.blank_lines) == ([(2, A), (5, B)], 4)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\\r", "\\u000b", "\x7f"])
def test_only_a_line_feed_ends_a_line(write: Any, mark: str) -> None:
    text = f'{{"text": "a{mark}b"}}\n'
    assert contents(write(text)) == [json.loads(text)]


def test_what_utf8_can_hold_comes_through(write: Any) -> None:
    text = "é 漢 🙂 \x00 \x1b[2J e\u0301"
    for ascii_only in (True, False):
        assert contents(write(json.dumps({"text": text}, ensure_ascii=ascii_only))) == [{"text": text}]


# --- bad lines ----------------------------------------------------------------

WANTED = "needs text, prompt and completion, messages, conversations, or instruction and output"
BAD = {
    "no JSON": (b'{"text": "a"', "no JSON: Expecting ',' delimiter at column 13"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "has more than one JSON value (the second at column 15)"),
    "array": (b'[{"text": "a"}]', "is an array, wanted one object a line (jq -c '.[]' makes them)"),
    "not closed": (b"{", "opens what is not closed on it, wanted one object a line (jq -c . makes them)"),
    "string": (b'"text"', "is a string, wanted an object with text, prompt and completion, messages"),
    "number": (b"1", "is a number, wanted an object"),
    "null": (b"null", "is null, wanted an object"),
    "no key": (b"{}", WANTED + "; it has no keys"),
    "other keys": (
        b'{"txt": "a", "id": 1}',
        WANTED + "; it has the keys txt, id",
    ),
    "half a pair": (
        b'{"prompt": "a"}',
        WANTED + "; it has the keys prompt",
    ),
    "two shapes": (b'{"text": "a", "messages": []}', "has text and messages, wanted only one of these"),
    "text null": (b'{"text": null}', "text is null, wanted a string"),
    "text number": (b'{"text": 1}', "text is a number, wanted a string"),
    "text true": (b'{"text": true}', "text is true or false, wanted a string"),
    "text list": (b'{"text": ["a"]}', "text is a list, wanted a string"),
    "text object": (b'{"text": {"a": 1}}', "text is an object, wanted a string"),
    "completion": (b'{"prompt": "a", "completion": 2.5}', "completion is a number, wanted a string"),
    "messages string": (b'{"messages": "a"}', "messages is a string, wanted a list of at least one"),
    "messages empty": (b'{"messages": []}', "messages is an empty list, wanted a list of at least one"),
    "message": (b'{"messages": ["a"]}', "message 1 is a string, wanted {role, content}"),
    "no role": (b'{"messages": [{"content": "a"}]}', "message 1 has no role; it has the keys content"),
    "content null": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}',
        "content of message 2 is null, wanted a string",
    ),
    "bad byte": (b'{"text": "\xff"}', "byte 0xff at byte 11 is not UTF-8"),
    "surrogate": (b'{"text": "a\\ud800"}', "text holds half a surrogate pair"),
    "NaN": (b'{"text": "a", "x": NaN}', "holds NaN, which is no JSON"),
    "Infinity": (b'{"text": "a", "x": -Infinity}', "holds -Infinity, which is no JSON"),
    "key twice": (b'{"text": "a", "text": "b"}', "has the key text twice"),
    "key twice below": (b'{"text": "a", "x": {"k": 1, "k": 1}}', "has the key k twice"),
    "too deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
    "digits": (b'{"text": "a", "x": ' + b"1" * 5000 + b"}", "4300 digits"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_told_with_its_number(write: Any, name: str) -> None:
    line, told = BAD[name]
    text = refusal(write(b'{"text": "good"}\n\n' + line + b"\n"))
    assert text.startswith("1 bad line: FILE:3: ")
    assert told in text


def test_a_missing_key_in_row_900(write: Any) -> None:
    rows = ['{"text": "a"}'] * 899 + ['{"txet": "a"}'] + ['{"text": "a"}'] * 50
    assert "FILE:900: needs text" in refusal(write("\n".join(rows)))


def test_all_bad_lines_are_counted_by_kind_and_the_first_of_each_are_told(write: Any) -> None:
    text = refusal(write('{"text": "a"}\nx\n' * 8 + '{"text": 1}\n{"text": "a", "x": x}\n'))
    assert text == (
        "10 bad lines: FILE:2: no JSON: Expecting value at column 1 (9 of this kind: 2, 4, 6, 8, 10, …); "
        "FILE:17: text is a number, wanted a string"
    )


def test_an_error_stays_short_whatever_is_in_the_file(write: Any) -> None:
    rows = [{letter * 500 + str(i): 0 for i in range(30)} for letter in "abcdefghijklmnop"]
    text = refusal(write("\n".join(map(json.dumps, rows))))
    assert text.startswith("16 bad lines: FILE:1: needs text") and "; and " in text
    assert len(text.encode()) < 1800


def test_bad_lines_of_several_files_are_told_together(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.jsonl", "two.jsonl", "good.jsonl")]
    for path, data in zip(paths, ("x\n", "\ny\n", '{"text": "a"}\n'), strict=True):
        path.write_text(data)
    with pytest.raises(DataError) as caught:
        refuse_faults(map(scan_rows, paths))
    assert str(caught.value).startswith(f"2 bad lines: {paths[0]}:1: ")
    assert f"{paths[1]}:2: " in str(caught.value)
    refuse_faults([scan_rows(paths[2])])


@pytest.mark.parametrize("lines_before", [0, 2])
def test_a_pretty_printed_file_is_told_once(write: Any, lines_before: int) -> None:
    one, two = json.dumps(A, indent=2), json.dumps([A, B], indent=2)
    start = f"1 bad line: FILE:{1 + lines_before}: is one JSON "
    blank = "\n" * lines_before
    text = refusal(write(blank + two))
    assert text.startswith(
        start + "array over several lines, wanted one object a line (jq -c '.[]' makes them"
    )
    for data in (one, f"{one}\n{one}"):
        text = refusal(write(blank + data))
        assert text.startswith(start + "object over several lines, wanted one object a line (jq -c '.' makes")
    assert refusal(write('[{"text": "a"},\n{"text": "b"}\n')).startswith("1 bad line: FILE:1: no JSON")


def test_a_line_that_is_too_long_is_not_read(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jsonl.LINE_BYTES == 16 << 20
    monkeypatch.setattr(jsonl, "LINE_BYTES", 1 << 20)
    long = b'{"text": "' + b"a" * (3 << 20) + b'"}\n'
    lines = scan_rows(write(b'{"text": "a"}\n' + long + b'{"text": "b"}\n' + long.strip()))
    assert lines.rows == [(1, A), (3, B)]
    assert str(lines.faults.told()).endswith("rows.jsonl:2: is longer than 1 MiB (2 of this kind: 2, 4)")


def test_names_out_of_a_file_cannot_forge_a_message(write: Any) -> None:
    text = refusal(write(json.dumps({"\x1b[2J\nmlxlora: all is well" + "k" * 100: 1})))
    assert "\\x1b[2J\\nmlxlora" in text
    assert "k" * 50 not in text


# --- files that are no rows at all --------------------------------------------


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16, wanted UTF-8 text. Fix: iconv -f UTF-16 -t UTF-8"),
        (
            '{"text": "a"}\n'.encode("utf-16-le"),
            "is UTF-16LE, wanted UTF-8 text. Fix: iconv -f UTF-16LE -t UTF-8",
        ),
        (
            '{"text": "a"}\n'.encode("utf-16-be"),
            "is UTF-16BE, wanted UTF-8 text. Fix: iconv -f UTF-16BE -t UTF-8",
        ),
        ('{"text": "a"}\n'.encode("utf-32"), "is UTF-32, wanted UTF-8 text. Fix: iconv -f UTF-32 -t UTF-8"),
        (b"\x1f\x8b\x08\x00\x00", "is gzip, wanted UTF-8 text. Fix: gunzip it"),
        (b"", "there is no row in it"),
        (b"\xef\xbb\xbf", "there is no row in it"),
        (b"\n \r\n\n", "there is no row in it but 3 blank lines"),
    ],
)
def test_a_file_without_rows(write: Any, data: bytes, told: str) -> None:
    assert refusal(write(data)) == f"FILE: {told}"


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    pipe, unreadable = tmp_path / "pipe", tmp_path / "unreadable"
    os.mkfifo(pipe)
    assert refusal(tmp_path / "missing") == "FILE: there is no such file"
    assert refusal(tmp_path) == "FILE: is a folder, wanted a regular file"
    assert refusal(pipe) == "FILE: is a pipe or a device, wanted a regular file"
    assert refusal(Path("/dev/zero")) == "FILE: is a pipe or a device, wanted a regular file"
    unreadable.touch(mode=0)
    if not os.access(unreadable, os.R_OK):
        assert refusal(unreadable) == "FILE: cannot be read: Permission denied"


# --- the formats --------------------------------------------------------------

SAME = {
    "rows.jsonl": '{"text": "a"}\n{"text": "b"}\n',
    "rows.ndjson": '{"text": "a"}\n{"text": "b"}\n',
    "lines.json": '{"text": "a"}\n{"text": "b"}\n',
    "pretty.json": json.dumps([A, B], indent=2),
    "line.json": json.dumps([A, B]),
    "ROWS.JSON": "\n \n" + json.dumps([A, B]),
    "mark.json": "\ufeff" + json.dumps([A, B], indent=1).replace("\n", "\r\n"),
    "rows.csv": "text\na\nb\n",
    "mark.csv": "\ufefftext\r\na\r\n\r\nb",
    "quoted.csv": '"text"\n"a"\n"b"\n',
    "wide.csv": "text,n\na,\n,\nb,\n",
    "semicolons.csv": "text;n\na;\nb;\n",
    "old_mac.csv": "text;n\ra;\rb;\r",
    "comma_in_heading.csv": '"n, or none";text\n;a\n;b\n',
    "line_in_heading.csv": '"n,\nor none";text\n;a\n;b\n',
    "rows.tsv": "text\tn\na\t\nb\t\n",
    "unknown.txt": '{"text": "a"}\n{"text": "b"}\n',
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_rows_come_out_of_all_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(SAME[name].encode())
    assert contents(path) == [A, B]


ODD = {
    "comma.json": (b'[{"text": "a"},\n {"text": "b"},\n]', "1 bad line: FILE:3: no JSON: "),
    "open.json": (
        b'[{"text": "a"},\n {"text": "b"}\n',
        "1 bad line: FILE:3: no JSON: Expecting ',' or ']' at column 1",
    ),
    "torn.json": (b'[{"text": "a"},\n {"text": "b', "1 bad line: FILE:2: no JSON: Unterminated string"),
    "more.json": (b'[{"text": "a"}]\n[]', "1 bad line: FILE:2: has more behind the end of the array"),
    "none.json": (b"[\n]", "FILE: there is no row in it"),
    "texts.json": (
        b'["a",\n "b"]',
        "2 bad lines: FILE:1: is a string, wanted an object with text, prompt and completion, messages, "
        "conversations, or instruction and output (2 of this kind: 1, 2)",
    ),
    "twice.json": (
        b'[{"text": "a", "text": "b"},\n{"text": NaN},\n{"text": "a"}]',
        "2 bad lines: FILE:1: has the key text twice; FILE:2: holds NaN, which is no JSON",
    ),
    "deep.json": (b"[" * 100_000, "1 bad line: FILE:1: is nested too deeply"),
    "bytes.json": (b'[\n{"text": "\xff"}]', "1 bad line: FILE:2: byte 0xff at byte 11 is not UTF-8"),
    "object.json": (
        b'{"data": [\n{"text": "a"}]}',
        "1 bad line: FILE:1: is one JSON object over several lines",
    ),
    "utf16.json": ('[{"text": "a"}]'.encode("utf-16-le"), "FILE: is UTF-16LE, wanted UTF-8 text"),
    "utf16.csv": ("text\na".encode("utf-16-le"), "FILE: is UTF-16LE, wanted UTF-8 text"),
    "utf16be.csv": ("text\na".encode("utf-16-be"), "FILE: is UTF-16BE, wanted UTF-8 text"),
    "single.jsonl": (b"{'text': 'a'}", "FILE:1: no JSON: Expecting property name enclosed in double quotes"),
    "joined.jsonl": (b'{"text": "a"}{"text": "b"}', "FILE:1: has more than one JSON value"),
    "commas.jsonl": (
        b'{"text": "a"},\n{"text": "b"},\n',
        "2 bad lines: FILE:1: has a comma behind the value, wanted one object a line and no more (2 of",
    ),
    "cells.csv": (
        b"text,n\na\nb,1,2\nc,3\n",
        "2 bad lines: FILE:2: has 1 cells, the heading 2 (2 of this kind: 2, 3)",
    ),
    "twice.csv": (b"text,text\na,b\n", "1 bad line: FILE:1: names the column text twice"),
    "unnamed.csv": (b"text,,\na,,\n", "1 bad line: FILE:1: names the column '' twice"),
    "quote.csv": (b'text\n"a\nb\n', "1 bad line: FILE:2: no table: "),
    "quotes.csv": (b'text\n"a"b\nc\n', "1 bad line: FILE:2: no table: "),
    "bytes.csv": (b"text\nc\xe9\n", "1 bad line: FILE:2: byte 0xe9 at byte 2 is not UTF-8"),
    "other.csv": (b"question,answer\na,b\n", "it has the keys question, answer. Fix: say which column is"),
    "empty.csv": (b"", "FILE: there is no row in it"),
    "heading.csv": (b"text\n", "FILE: there is no row in it"),
    "rows.parquet": (b"PAR1....", "FILE: is parquet, wanted UTF-8 text. Fix: save it as JSON Lines"),
    "rows.bz2": (b"BZh91AY&SY....", "FILE: is bzip2, wanted UTF-8 text. Fix: bunzip2 it"),
    "rows.xz": (b"\xfd7zXZ\x00....", "FILE: is xz, wanted UTF-8 text. Fix: unxz it"),
    "rows.zst": (b"\x28\xb5\x2f\xfd....", "FILE: is zstd, wanted UTF-8 text. Fix: unzstd it"),
    "rows.arrow": (b"ARROW1....", "FILE: is arrow, wanted UTF-8 text. Fix: save it as JSON Lines"),
    "rows.zip": (b"PK\x03\x04....", "FILE: is zip, wanted UTF-8 text. Fix: unzip it"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_wrong_with_a_file_is_told_with_its_line(tmp_path: Path, name: str) -> None:
    data, told = ODD[name]
    path = tmp_path / name
    path.write_bytes(data)
    assert told in refusal(path)


def test_elements_of_an_array_have_the_line_that_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([A, {"txt": 1}, B, {"text": 1}], indent=2))
    text = refusal(path)
    assert "FILE:5: needs text" in text and "FILE:11: text is a number" in text


def test_cells_may_be_long_and_have_lines(tmp_path: Path) -> None:
    long = "word, " * 100_000
    (tmp_path / "rows.csv").write_text(f'prompt,completion\n"{long}","two\nlines ""quoted"""\nq,a\n')
    assert read_rows(tmp_path / "rows.csv") == [
        (2, {"prompt": long, "completion": 'two\nlines "quoted"'}),
        (4, {"prompt": "q", "completion": "a"}),
    ]


def test_columns_are_read_as_one_says(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,id\nhow?,so,1\n")
    found = scan_rows(path, {"prompt": "question", "completion": "answer"})
    assert found.rows == [(2, {"prompt": "how?", "completion": "so"})]
    assert found.unread == {"id": 1}
