"""Which BLAS is the fastest: remembered for the machine, and for nothing but what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from mlxlora_openblas import blas, fastest
from mlxlora_openblas.fastest import remember, remembered


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two files that stand for libraries, and a name; what is remembered goes to a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("one.so", "two.so"):
        (tmp_path / name).write_bytes(b"")
    return [str(tmp_path / "one.so"), str(tmp_path / "two.so"), "libthree.so.0"]


def test_the_fastest_is_known_until_anything_changes(
    libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remembered(libraries, 2) is None
    remember(libraries[1], libraries, 2)
    assert remembered(libraries, 2) == libraries[1]
    assert remembered(libraries, 4) is None
    assert remembered(libraries[1:], 2) is None
    os.utime(libraries[0], ns=(1, 1))
    assert remembered(libraries, 2) is None
    remember(libraries[2], libraries, 2)
    assert remembered(libraries, 2) == libraries[2]
    monkeypatch.setattr(fastest, "_processor", lambda: "another")
    assert remembered(libraries, 2) is None


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda text: "", lambda text: text[:20], lambda text: "[]", lambda text: "null"),
        *(lambda text: text.replace("two.so", "none.so"), lambda text: '{"fastest": ["two.so"]}'),
        lambda text: text + " " * 70_000,
    ],
)
def test_a_damaged_file_is_as_if_there_were_none(libraries: list[str], damage: Callable[[str], str]) -> None:
    remember(libraries[1], libraries, 2)
    file = fastest._file()
    assert file is not None
    file.write_text(damage(file.read_text()))
    assert remembered(libraries, 2) is None
    remember(libraries[0], libraries, 2)
    assert remembered(libraries, 2) == libraries[0]


def test_without_a_home_nothing_is_remembered(libraries: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "relative")
    remember(libraries[0], libraries, 2)
    assert remembered(libraries, 2) is None and not Path("relative").exists()


def test_the_fastest_is_opened_first_and_what_cannot_be_opened_is_passed_over(
    libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next(path for path in blas.candidates() if "scipy" in path)
    monkeypatch.delenv(blas.LIBRARY, raising=False)
    monkeypatch.setattr(blas, "candidates", lambda: iter([*libraries[:2], real]))
    found = [*libraries[:2], real]
    assert blas.open_blas(1).path == real
    assert blas.alternatives(1) == []  # there is one alone that can be opened
    tried: list[str] = []
    load = blas.load

    def noted(path: str, threads: int) -> blas.Blas:
        tried.append(path)
        return load(path, threads)

    monkeypatch.setattr(blas, "load", noted)
    for first in (real, libraries[1]):
        remember(first, found, 1)
        tried.clear()
        assert blas.open_blas(1).path == real
        assert tried[0] == first
    monkeypatch.setenv(blas.LIBRARY, real)
    assert blas.alternatives(1) == []


def test_what_is_written_is_one_small_file(libraries: list[str], tmp_path: Path) -> None:
    remember(libraries[0], libraries, 2)
    assert [path.name for path in (tmp_path / "cache" / "mlxlora").iterdir()] == ["blas.json"]
    told = json.loads((tmp_path / "cache" / "mlxlora" / "blas.json").read_text())
    assert told["of"]["threads"] == 2 and told["of"]["libraries"]["libthree.so.0"] == 0
