"""What a child that reads a package tells: whatever comes in its place costs that package alone."""

from __future__ import annotations

import json
import random
import selectors
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from mlxlora_docstrings import DocstringOptions, attempt, build
from mlxlora_docstrings.attempt import Attempt
from mlxlora_docstrings.findings import Findings, decode
from mutations import mutation

COUNT = 10_000
SEQ_LIMIT = 300
GOOD = '"""A good module."""\n'


def told() -> list[list[str]]:
    """The records of a child that lived."""
    return [
        ["pid", "4711"],
        ["at", "pkg"],
        ["at", "pkg.sub"],
        ["row", "pkg.f", 'A docstring with a tab\t, a quote " and é 🙂.\n    Indented.'],
        ["row", "pkg.sub.Class.prop", "x" * SEQ_LIMIT],
        ["skip", "pkg.broken", "ModuleNotFoundError: No module named 'absent'"],
        ["skip", "pkg.sub.*", "it takes what another has"],
        ["done"],
    ]


def encoded(records: list[list[Any]]) -> bytes:
    return b"".join("\t".join(map(json.dumps, record)).encode() + b"\n" for record in records)


def taken(data: bytes, piece: int) -> Attempt:
    """What the parent makes of ``data``, read in pieces."""
    made = Attempt("pkg", SEQ_LIMIT)
    for start in range(0, len(data), piece):
        made.feed(data[start : start + piece])
    return made


def must_hold(data: bytes, piece: int) -> bool:
    """Feed it; True when it was refused. Nothing but ValueError may come, and nothing odd may be kept."""
    try:
        made = taken(data, piece)
    except ValueError:
        return True
    for path, doc in made.documented.items():
        assert path == "pkg" or path.startswith("pkg.")
        assert type(doc) is str and len(doc) <= SEQ_LIMIT
        doc.encode()
    for source, reason in made.skipped.items():
        assert source.startswith("pkg") and reason.isprintable() and len(reason) <= 200
    assert 0 <= made.pid < 1 << 31
    return False


def test_what_a_child_writes_is_what_its_parent_reads(tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as file:
        findings = Findings(file, SEQ_LIMIT, "/nowhere")
        findings.begin(4711)
        findings.at("pkg")
        findings.row("pkg.f", "Tab\t, line\nand 🙂.")
        findings.skip("pkg.g", ValueError("a\x1b[31m\nb"))
        findings.skip("pkg.g", "a second reason")
        findings.done()
    for piece in (1, 7, 1 << 20):
        made = taken((tmp_path / "out").read_bytes(), piece)
        assert (made.pid, made.place, made.is_done) == (4711, "pkg", True)
        assert made.documented == {"pkg.f": "Tab\t, line\nand 🙂."}
        assert made.skipped == {"pkg.g": "ValueError: a [31m b"}


def test_what_a_child_writes_just_before_its_end_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, which looks into the pipe a moment before, and at the process a moment after."""

    class Busy(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            if process.poll() is None:
                process.wait()
                return []
            return super().select(timeout)

    monkeypatch.setattr(selectors, "DefaultSelector", Busy)
    code = f"import sys; sys.stdout.buffer.write({encoded(told())!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        made = Attempt("pkg", SEQ_LIMIT)
        attempt._listen(process, made, time.monotonic() + 60, Event())
    assert made.is_done and made.documented.keys() == {"pkg.f", "pkg.sub.Class.prop"}


def test_damage_byte_by_byte() -> None:
    data = encoded(told())
    assert not must_hold(data, 64)
    refused = sum(must_hold(mutation(data, [data], 4096, "records", number), 64) for number in range(COUNT))
    assert refused > COUNT // 3, "or nothing was damaged"


def odd(draw: random.Random, depth: int = 0) -> Any:
    """A value of some type."""
    plain: list[Any] = [
        None, True, 0, -1, 1e308, 2**64, float("nan"), "", "pkg", "pkg.f", "other.f", "../pkg",
        "pkg." * 500, "done", "row", "pid", "\ud800", "\x00\x1b[2J", "1" * 5000, "-5",
        "x" * (SEQ_LIMIT + 1), "a b", "pkg.*.*",
    ]  # fmt: skip
    if depth > 3 or draw.random() < 0.7:
        return draw.choice(plain)
    return draw.choice(([odd(draw, depth + 1)] * 3, {"row": odd(draw, depth + 1)}, {"": plain}))


def damage(records: list[list[Any]], draw: random.Random) -> None:
    """Damage the structure of records in one way."""
    at, way = draw.randrange(len(records)), draw.randrange(8)
    record = records[at]
    if way < 3 and record:
        record[min(way, len(record) - 1)] = odd(draw)
    elif way == 3:
        record.append(odd(draw))
    elif way == 4 and record:
        record.pop()
    elif way == 5:
        draw.shuffle(records)
    elif way == 6:
        records.insert(at, draw.choice(([odd(draw) for _ in range(draw.randrange(4))], [[]], record)))
    elif len(records) > 1:
        records.pop(at)


def test_damage_to_the_structure() -> None:
    refused = 0
    for number in range(COUNT):
        draw = random.Random(number)
        records: list[list[Any]] = told()
        for _ in range(draw.choice((1, 1, 2, 4))):
            damage(records, draw)
        refused += must_hold(encoded(records), 1 << 16)
    assert refused > COUNT // 3, "or nothing was damaged"


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 200_000,
        b'["row", {"a": 1}, 5]',
        b'["at", "x", "y"]',
        b'"row"\t' + b"[" * 200_000,
        b'"row"\t"pkg.f"\t{"deep": ' + b"[" * 200_000,
        b'"row"\t"other.f"\t"Forged."',
        b'"row"\t"pkgs.f"\t"Forged."',
        b'"row"\t"pkg.f"\t"' + b"\\ud800" + b'"',
        b'"row"\t"pkg.a b"\t"x"',
        b'"skip"\t"pkg.f"\t"\\u001b[2J"',
        b'"skip"\t"pkg.f"\t"' + b"x" * 201 + b'"',
        b'"pid"\t"1"',
        b'"pid"\t"' + b"9" * 5000 + b'"',
        b'"done"\t"done"',
        b"",
        b"\x00",
        b"\xff\xfe",
        b'"at"\t"pkg',
    ],
)
def test_a_line_that_no_child_of_ours_writes_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode(line, "pkg", SEQ_LIMIT)


def test_endless_records_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt.FINDINGS_BYTES <= 64 << 20
    monkeypatch.setattr(attempt, "FINDINGS_BYTES", 1 << 20)
    monkeypatch.setattr(attempt, "FINDINGS_RECORDS", 10_000)
    endless = {
        "too much": encoded([["row", "pkg.f", "x" * SEQ_LIMIT]] * 50),
        "too many": encoded([["at", "pkg"]] * 500),
        "no end": b"x" * 50_000,
    }
    tracemalloc.start()
    try:
        for chunk in endless.values():
            made = Attempt("pkg", SEQ_LIMIT)
            made.feed(encoded([["pid", "4711"]]))
            with pytest.raises(ValueError):
                for _ in range(1000):
                    made.feed(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


# --- packages that write into it themselves ------------------------------------

HEAD = """import os, sys
def outs():
    for n in map(int, os.listdir("/proc/self/fd")):
        if n > 2 and os.path.realpath(f"/proc/self/fd/{n}").split("/")[-1].startswith("pipe:"):
            yield n
"""
TAMPERS = {
    "garbage": "[os.write(n, b'[[[[\\n') for n in outs()]",
    "deep": "[os.write(n, b'[' * 200000 + b'\\n') for n in outs()]",
    "forges": '[os.write(n, b\'"row"\\t"string.capwords"\\t"Forged."\\n\') for n in outs()]',
    "floods": '[os.write(n, b\'"at"\\t"floods"\\n\' * 10000) for n in outs() for _ in range(1000)]',
    "no_end": "[os.write(n, b'x' * 100000) for n in outs() for _ in range(1000)]",
    "twice": '[os.write(n, b\'"pid"\\t"2"\\n\') for n in outs()]',
}
WROTE = "it wrote into what the process that reads it tells"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the pipe in /proc")
def test_a_package_that_writes_into_it_loses_its_own_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, source in TAMPERS.items():
        (tmp_path / f"{name}.py").write_text(f'"""Bad."""\n{HEAD}{source}\n')
    (tmp_path / "closes.py").write_text(f'"""Bad."""\n{HEAD}[os.close(n) for n in outs()]\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    names = (*TAMPERS, "closes", "string")
    made = build(DocstringOptions(packages=names, time_limit=100.0))
    reasons = {skip.source: skip.reason for skip in made.skipped}
    assert {name: reasons[name] for name in TAMPERS} == dict.fromkeys(TAMPERS, WROTE)
    assert reasons["closes"]
    texts = [row.content["text"] for row in made.rows]
    assert all("A: string" in text and "Forged" not in text for text in texts)
    assert len(texts) >= 3
