"""Documents that anybody may have written become values that can be worked with, or one line."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path

import pytest

from mlxlora_core.errors import DataError, MlxloraError, ModelError
from mlxlora_core.files.documents import (
    DEPTH,
    finite,
    parse_json,
    parse_toml,
    read_form,
    read_json,
    read_settled,
    read_sound,
)
from mlxlora_core.files.forms import Map, Table, Whole

INF = math.inf


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "f:1:1: is no JSON: Expecting value"),
        (b'{"a": 1', "f:1:8: is no JSON: Expecting ',' delimiter"),
        (b"\xff\xfe{\x00", "f:1: is not UTF-8"),
        (b"[1]\n[\xff]", "f:2: is not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "f: is no usable JSON: a there twice"),
        (b"[NaN]", "f: is no usable JSON: NaN is no number"),
        (b"-Infinity", "f: is no usable JSON: -Infinity is no number"),
        (b'{"a": [1, {"b": 1e400}]}', "f: is no usable JSON: it has a number that is larger"),
        (b"9" * 5000, "f: is no usable JSON: Exceeds the limit"),
        (b"[" * 1_000_000, f"f: is no usable JSON: more than {DEPTH} lists and objects"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, f"f: is no usable JSON: more than {DEPTH} lists and objects"),
        (b'{"' + b"k" * 100_000 + b'": 1, "' + b"k" * 100_000 + b'": 2}', "there twice"),
    ],
)
def test_what_is_no_json(data: bytes, told: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_json(data, "f")
    assert told in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_json() -> None:
    deep = b"[" * DEPTH + b"1" + b"]" * DEPTH
    assert json.dumps(parse_json(deep, "f")).encode() == deep
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud800", "b": 12345678901234567890}', "f") == {
        "a": "\ud800",
        "b": 12345678901234567890,
    }


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"a = 1\na = 2\n", "f:2:6: is no TOML: Cannot overwrite"),
        (b"a = \xff", "f:1: is not UTF-8"),
        (b"a = " + b"[" * 100_000, "f: is no usable TOML: more than 64"),
        (b"a." * 500_000 + b"a = 1", "f: is no usable TOML: more than 64"),
        (b"[" + b'"a" . ' * 300 + b"a]", "f: is no usable TOML: more than 64"),
        (b"x = {" + b"'a'." * 300 + b"a = 1}", "f: is no usable TOML: more than 64"),
        (b"a = " + b"9" * 5000, "f: is no usable TOML: Exceeds the limit"),
    ],
)
def test_what_is_no_toml(data: bytes, told: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_toml(data, Path("f"), DataError)
    assert told in str(caught.value)


def test_text_with_many_dots_is_no_key() -> None:
    text = "Wait" + "." * 5000 + " and see. " * 500
    assert parse_toml(f'a = "{text}"\r\nb.c = 1.5'.encode(), Path("f"), DataError)[0] == {
        "a": text,
        "b": {"c": 1.5},
    }


def test_a_file_is_held_against_its_form(tmp_path: Path) -> None:
    path, form = tmp_path / "x.json", Table({"a": Map(Whole())})
    path.write_text('{"a": {"x": 1, "y": "z"}}')
    assert read_sound(path, form, 100) == (
        {"a": {"x": 1}},
        ["x.json: a.y: wanted a whole number from 0 to 9223372036854775807, got 'z'"],
    )
    with pytest.raises(DataError, match=r"x.json: is not what mlxlora writes: a.y: wanted .*Fix: mend"):
        read_form(path, form, 100, DataError, "mend")
    path.write_text('{"a": {"x": 1}}')
    assert read_form(path, form, 100) == read_sound(path, form, 100)[0] == {"a": {"x": 1}}
    path.write_text("[]")
    with pytest.raises(ModelError, match="is not what mlxlora writes: wanted an object"):
        read_sound(path, form, 100)
    path.write_text(" " * 200)
    with pytest.raises(ModelError, match="is larger than"):
        read_json(path, 100)


def test_a_file_that_is_just_being_replaced_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": ')
    later = threading.Timer(0.1, lambda: path.write_text('{"a": 1}'))
    later.start()
    assert read_settled(lambda: read_json(path, 100), path) == {"a": 1}
    later.join()
    path.unlink()
    later = threading.Timer(0.1, lambda: path.write_text('{"a": 2}'))
    later.start()
    assert read_settled(lambda: read_json(path, 100), path) == {"a": 2}
    later.join()


def test_a_file_that_stays_as_it_is_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": ')
    os.utime(path, (1e9, 1e9))
    tries: list[float] = []

    def read() -> object:
        tries.append(time.monotonic())
        return read_json(path, 100)

    with pytest.raises(MlxloraError):
        read_settled(read, path)
    assert len(tries) == 1


def test_numbers_that_json_cannot_hold_are_null_beside_a_word() -> None:
    value = {"a": INF, "b": [1.5, -INF, {"c": math.nan, "d": "x"}], "e": (1, 2), 3: 4}
    told = finite(value)
    assert told == {
        "a": None,
        "a_is": "infinite",
        "b": [1.5, None, {"c": None, "c_is": "not a number", "d": "x"}],
        "e": [1, 2],
        3: 4,
    }
    json.dumps(told, allow_nan=False)
    assert finite({"a": -INF})["a_is"] == "minus infinite" and value["a"] == INF
