"""Damaged files of every kind are refused in one line or read right; ``fuzz.py`` makes any number."""

from __future__ import annotations

import os
import time
from pathlib import Path

import file_kinds
import fuzz
import pytest

from mlxlora_core.errors import ModelError

COUNT = 150


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    file_kinds.prepare(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("kind", file_kinds.KINDS)
def test_damage_is_refused_in_one_line_or_harmless(kind: str, material: Path) -> None:
    tally = fuzz.fuzz(kind, range(COUNT), material)
    assert tally.faults == {}
    assert tally.refused + tally.same + tally.equal == COUNT
    assert tally.refused > COUNT // 2, "or nothing was damaged"


class Endless(ModelError):
    """An error that is no short line."""

    def __str__(self) -> str:
        return "a" * 3000


class Defective(file_kinds.Index):
    """A parser with every fault that the harness is there to find; which, the length of the file tells."""

    def parse(self) -> object:
        content = self.path.read_bytes()
        if len(content) == 1:
            raise KeyError("a traceback")
        if len(content) == 2:
            raise Endless("told")
        if len(content) == 3:
            os.abort()
        if len(content) == 4:
            bytearray(400 << 20)
        if len(content) == 5:
            until = time.process_time() + fuzz.SECONDS + 0.1
            while time.process_time() < until:
                pass
        return content

    def reference(self) -> object:
        return self.path.read_bytes() if len(self.path.read_bytes()) != 6 else b"other"


def test_the_harness_finds_each_kind_of_fault(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A child is a process of its own, which has to know the parser too.
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import file_kinds, test_fuzz\nfile_kinds.KINDS['defective'] = test_fuzz.Defective\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cuts = [4 * length + 1 for length in range(1, 8)]
    faults = fuzz.fuzz("defective", cuts, material).faults
    told = [faults.get(cut, "") for cut in cuts]
    assert told[0].startswith("raised KeyError")
    assert told[1].startswith("told in")
    assert told[2] == "the child died with -6"
    assert told[3].startswith("took 399 MB") or told[3].startswith("took 40")
    assert told[4].startswith("took 2.")
    assert "another reader finds" in told[5]
    assert told[6] == ""
