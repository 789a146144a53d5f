"""Room on a disk: taken at once, without a name, and let go where the disk is full."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import ResourceError
from mlxlora_core.files import durable
from mlxlora_core.files import room as room_module
from mlxlora_core.files.room import Room, is_full, written

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


class Full:
    """A disk that is full so many times."""

    def __init__(self, times: int) -> None:
        self.times, self.calls = times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise ResourceError("full")
        return "written"


def test_what_finds_the_disk_full_is_written_into_the_room_that_was_held(tmp_path: Path) -> None:
    once = Full(1)
    with pytest.raises(ResourceError):
        written(once)
    assert once.calls == 1, "no room was held"
    room = Room()
    room.hold(tmp_path, COUNT)
    once = Full(1)
    assert written(once) == "written" and once.calls == 2 and not room.held
    room.hold(tmp_path, COUNT)
    with pytest.raises(ResourceError):
        written(Full(2))

    def meanwhile() -> str:  # somebody else lets it go
        if room.held:
            room.release()
            raise ResourceError("full")
        return "written"

    room.hold(tmp_path, COUNT)
    assert written(meanwhile) == "written"


def test_who_fills_the_disk_is_waited_for_before_the_room_is_let_go(tmp_path: Path) -> None:
    seen: list[bool] = []
    room = Room(lambda seconds: seen.append(room.held))
    room.hold(tmp_path, COUNT)
    assert written(Full(1)) == "written" and seen == [True] and not room.held


def test_room_that_is_being_let_go_is_waited_for(tmp_path: Path) -> None:
    """The disk has the bytes when the file is closed, and not before."""
    room, begun, free = Room(), threading.Event(), []
    room.hold(tmp_path, COUNT)

    class Slow:
        def close(self) -> None:
            begun.set()
            time.sleep(0.2)
            free.append(True)

    assert room._file is not None
    room._file.close()
    room._file = Slow()  # type: ignore[assignment]
    other = threading.Thread(target=room.release)

    def write() -> str:
        if not begun.is_set():
            other.start()
            begun.wait(60)
        if not free:
            raise ResourceError("full")
        return "written"

    assert written(write) == "written"
    other.join()


def test_a_line_that_found_half_of_its_room_is_not_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a line of a log, of which the disk took the first bytes."""
    log, room = tmp_path / "log", Room()
    durable.append_line(log, "one")
    room.hold(tmp_path, COUNT)
    opened = open

    def halving(*given: Any, **named: Any) -> Any:
        file = opened(*given, **named)
        if not room.held:
            return file
        whole = file.write
        wrapped = io.BytesIO()
        wrapped.write = lambda content: whole(content[: len(content) // 2])  # type: ignore[method-assign]
        wrapped.tell, wrapped.close = file.tell, file.close  # type: ignore[method-assign]
        return wrapped

    monkeypatch.setattr(durable, "open", halving, raising=False)
    durable.append_line(log, "two and more")
    assert log.read_text() == "one\ntwo and more\n"
    durable.append_line(log, "three")
    assert log.read_text() == "one\ntwo and more\nthree\n"


def test_which_faults_say_that_a_disk_is_full() -> None:
    assert is_full(OSError(errno.ENOSPC, "x")) and is_full(OSError(errno.EDQUOT, "x"))
    assert not is_full(OSError(errno.EACCES, "x")) and not is_full(ValueError("x"))
