from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mlxlora_core.files.exchange import exchange


def test_two_folders_change_places(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if not exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot do that")
    assert os.listdir(tmp_path / "one") == ["other"] and os.listdir(tmp_path / "other") == ["one"]


def test_a_name_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    if not exchange(tmp_path / "one", tmp_path / "one"):
        pytest.skip("this file system cannot do that")
    with pytest.raises(OSError) as caught:
        exchange(tmp_path / "one", tmp_path / "absent")
    assert caught.value.errno == errno.ENOENT


def test_a_system_that_cannot_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert exchange(tmp_path, tmp_path) is False
