"""Files of our own, damaged, are one short line and a documented code; ``own_files.py`` makes any number."""

from __future__ import annotations

import os
from pathlib import Path

import own_files
import pytest

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
COUNT = 5000 if ALL else 15  # of each way


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> own_files.Bench:
    return own_files.prepare(tmp_path_factory.mktemp("own"))


@pytest.mark.parametrize("way", own_files.WAYS)
@pytest.mark.parametrize("file", own_files.FILES)
def test_damage_is_one_line_or_harmless(bench: own_files.Bench, file: str, way: str) -> None:
    tally = own_files.fuzz(bench, file, way, range(COUNT))
    assert tally.faults == {}
    assert sum(tally.codes.values()) >= COUNT


def test_damage_is_done(bench: own_files.Bench) -> None:
    for file in own_files.FILES:
        for way in own_files.WAYS:
            made = {own_files.damaged(bench, file, way, number) for number in range(50)}
            assert len(made) > 40 and made != {bench.good[file]}
            assert own_files.damaged(bench, file, way, 7) == own_files.damaged(bench, file, way, 7)


@pytest.mark.parametrize(
    ("raised", "found"),
    [
        (KeyError("x"), "report ended with 70"),
        (OverflowError("x" * 3000), "report ended with 70"),
        (SystemExit(1), "report ended with 70"),
    ],
)
def test_the_harness_finds_what_it_is_there_for(
    bench: own_files.Bench, monkeypatch: pytest.MonkeyPatch, raised: BaseException, found: str
) -> None:
    from mlxlora_core.cli import report

    def broken(folder: Path) -> None:
        raise raised

    monkeypatch.setattr(report, "read_facts", broken)
    assert own_files.fuzz(bench, "metrics.jsonl", "bytes", range(1, 2)).faults[1].startswith(found)
