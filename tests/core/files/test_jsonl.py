"""The decoder of rows: what it notes."""

from __future__ import annotations

from mlxlora_core.files import jsonl


def test_a_key_twice_among_a_million_is_found_without_counting_each() -> None:
    keys = ", ".join(f'"{i}": 0' for i in range(200_000))
    decoder = jsonl._Decoder()
    decoder.decode(f'{{{keys}, "199999": 0}}')
    assert decoder.noted == ["has the key 199999 twice"]


def test_an_array_of_many_short_rows_keeps_its_lines(tmp_path: object) -> None:
    scan = jsonl._Scan("a \n\n b\n" + " " * 100_000 + "c")
    scan.skip(1)
    assert (scan.line, scan.column, scan.letter) == (3, 2, "b")
    scan.skip(scan.place + 1)
    assert (scan.line, scan.column, scan.letter) == (4, 100_001, "c")
    scan.skip(scan.place + 1)
    assert scan.letter == ""
