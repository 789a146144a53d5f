"""Room on a disk: taken at once, without a name, and let go where the disk is full."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from mlxlora_core.files import room as room_module
from mlxlora_core.files.room import Room, is_full

COUNT = 3 << 20


def taken(room: Room) -> int:
    """Bytes of the disk that it has."""
    assert room._file is not None
    return os.fstat(room._file.fileno()).st_blocks * 512


@pytest.mark.parametrize("way", ["posix_fallocate", "written"])
def test_it_takes_what_it_holds_and_has_no_name(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "written":  # as on a Mac
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    room = Room()
    assert not room.held
    room.hold(tmp_path, COUNT)
    assert room.held and taken(room) >= COUNT
    assert list(tmp_path.iterdir()) == []
    room.hold(tmp_path, COUNT // 2)
    assert COUNT // 2 <= taken(room) < COUNT, "instead of, and not beside"
    room.release()
    room.release()
    assert not room.held


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(room_module.shutil, "disk_usage", lambda folder: usage._replace(free=count))


def test_it_is_held_only_where_there_is_enough_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room()
    free(monkeypatch, 3 * COUNT - 1)
    room.hold(tmp_path, COUNT)
    assert not room.held
    free(monkeypatch, 3 * COUNT)
    room.hold(tmp_path, COUNT)
    assert room.held
    room.release_where_full()
    assert room.held
    free(monkeypatch, room_module.FULL_BYTES - 1)
    room.release_where_full()
    assert not room.held
    room.release_where_full()


def test_a_folder_that_is_not_there_holds_none(tmp_path: Path) -> None:
    room = Room()
    room.hold(tmp_path / "none", COUNT)
    assert not room.held


def test_a_disk_that_turns_out_to_be_full_holds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    room = Room()
    room.hold(tmp_path, COUNT)
    assert not room.held


def test_which_faults_say_that_a_disk_is_full() -> None:
    assert is_full(OSError(errno.ENOSPC, "x")) and is_full(OSError(errno.EDQUOT, "x"))
    assert not is_full(OSError(errno.EACCES, "x")) and not is_full(ValueError("x"))
