from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import ResourceError, SafetyError
from mlxlora_core.files import durable, writable
from mlxlora_core.files.leftovers import temporary_name

Check = Callable[[Path], None]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ours(folder: Path) -> bool:
    return (folder / "mark").is_file()


def run(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python of its own, so that it can be killed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# --- files --------------------------------------------------------------------


def test_a_file_is_written_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    durable.write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_middle_leaves_the_old_file_and_no_other(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    path = tmp_path / "file"
    durable.write_text(path, "old")

    with pytest.raises(fault), durable.new_file(path) as file:
        file.write(b"half of the n")
        raise fault
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    words = r"file: cannot be written: No space left.*free some space"
    with pytest.raises(ResourceError, match=words), durable.new_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_file_over_the_limit_of_the_process_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write_text(path, "old")
    code = """
import resource, sys
from pathlib import Path
from mlxlora_core.errors import ResourceError
from mlxlora_core.files import durable
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    durable.write_text(Path(sys.argv[1]), "x" * 100_000)
except ResourceError as fault:
    print(fault)
"""
    assert "File too large. Fix: raise ulimit -f" in run(code, path).stdout
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    durable.write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"


def test_what_is_no_regular_file_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(SafetyError, match="no regular file"):
            durable.write_text(path, "new")
    assert pipe.is_fifo()


def test_half_a_surrogate_pair_becomes_its_json_escape(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "file", {"a": "\ud800é\u2028"})
    assert json.loads((tmp_path / "file").read_text("utf-8")) == {"a": "\ud800é\u2028"}
    durable.append_line(tmp_path / "log", "\udfff")
    assert (tmp_path / "log").read_bytes() == b"\\udfff\n"


def test_json_that_is_none_is_refused_before_the_old_file_goes(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "file", 1)
    with pytest.raises(ValueError):
        durable.write_json(tmp_path / "file", float("nan"))
    assert (tmp_path / "file").read_text() == "1\n"


def test_a_copy_has_the_bytes_and_tells_which_end_failed(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"\0\xff")
    durable.copy_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"\0\xff"
    with pytest.raises(ResourceError, match="absent: cannot be read: No such file"):
        durable.copy_file(tmp_path / "absent", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"\0\xff"


# --- folders ------------------------------------------------------------------


def build(target: Path, content: str, **arguments: Any) -> None:
    with durable.new_folder(target, ours=ours, **arguments) as folder:
        durable.write_text(folder / "mark", content)
        durable.write_text(folder / "more", content)


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "made" / "target"
    with durable.new_folder(target) as folder:
        durable.write_text(folder / "mark", "1")
        assert not target.exists()
        assert folder.parent == target.parent
    assert names(target) == ["mark"]
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, FileNotFoundError])
def test_an_exception_leaves_no_folder_and_is_not_disguised(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    with pytest.raises(fault), durable.new_folder(tmp_path / "target") as folder:
        durable.write_text(folder / "mark", "half")
        raise fault
    assert names(tmp_path) == []


def test_an_empty_folder_is_filled_and_one_with_content_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    build(target, "1")
    with pytest.raises(SafetyError, match=r"there already.*--overwrite"):
        build(target, "2")
    assert (target / "more").read_text() == "1"
    build(target, "2", overwrite=True)
    assert (target / "more").read_text() == "2"
    (target / "mark").unlink()
    with pytest.raises(SafetyError, match="something else"):
        build(target, "3", overwrite=True)
    assert names(target) == ["more"]
    assert names(tmp_path) == ["target"]


def test_a_file_or_a_dangling_link_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(SafetyError, match="no folder"):
            build(tmp_path / name, "2", overwrite=True)
    assert (tmp_path / "file").read_text() == "1"


def test_the_folder_one_stands_in_and_a_link_to_a_folder_can_be_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build(Path("."), "1")
    assert names(tmp_path / "here") == ["mark", "more"]
    (tmp_path / "link").symlink_to(tmp_path / "here")
    build(tmp_path / "link", "2", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "here" / "more").read_text() == "2"
    assert names(tmp_path) == ["here", "link"]


# --- kills --------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from mlxlora_core.files import durable

target, at = Path(sys.argv[1]), int(sys.argv[2])
seen = 0

def count(event, arguments):
    global seen
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
with durable.new_folder(target, overwrite=True, ours=lambda folder: True) as folder:
    durable.write_text(folder / "mark", "new")
    durable.write_text(folder / "more", "new")
"""


def test_killed_anywhere_a_folder_is_whole_and_the_next_run_clears_up(tmp_path: Path) -> None:
    survived = []
    for at in range(1, 40):
        target = tmp_path / str(at) / "target"
        build(target, "old")
        done = run(KILLED, target, str(at))
        if done.returncode == 0:
            break
        assert done.returncode == -9
        if target.exists():  # else it had just been moved away, and is put back below
            survived.append({path.read_text() for path in target.iterdir()})
            assert names(target) == ["mark", "more"]
        with pytest.raises(SafetyError, match="there already"):
            build(target, "refused")
        assert {path.read_text() for path in target.iterdir()} in ({"old"}, {"new"})
        build(target, "newer", overwrite=True)
        assert names(target.parent) == ["target"]
        assert (target / "more").read_text() == "newer"
    else:
        pytest.fail("it never came to its end")
    assert len(survived) > 5 and {"old"} in survived and {"new"} in survived


def test_a_file_of_a_killed_process_is_cleared_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "[a]*.txt"
    code = """
import os, signal, sys
from pathlib import Path
from mlxlora_core.files import durable
with durable.new_file(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(code, path).returncode == -9
    assert len(names(tmp_path)) == 1 and not path.exists()
    living = tmp_path / temporary_name(path.name, os.getppid(), "tmp")
    living.write_text("still at work")
    durable.write_text(path, "new")
    assert names(tmp_path) == sorted([path.name, living.name])


def test_the_mode_of_an_older_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    durable.write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o640 and path.read_text() == "new"


def test_a_temporary_name_that_is_taken_is_not_written_through(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "file", tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    (tmp_path / temporary_name("file", os.getpid(), "tmp")).symlink_to(elsewhere)
    durable.write_text(path, "new")
    assert elsewhere.read_text() == "precious" and path.read_text() == "new"


def test_a_folder_goes_at_once_and_one_can_be_put_aside(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    durable.remove_folder(tmp_path / "one")
    assert names(tmp_path) == ["two"]
    durable.put_aside(tmp_path / "two", "damaged")
    (tmp_path / "two").mkdir()
    durable.put_aside(tmp_path / "two", "damaged")
    durable.put_aside(tmp_path / "two", "damaged")
    assert names(tmp_path) == ["damaged-two-1", "damaged-two-2"]
    assert (tmp_path / "damaged-two-1" / "file").read_text() == "two"


# --- modes --------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("wanted", [0o600, 0o640, 0o644, 0o666, 0o400])
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_a_temporary_file_has_the_mode_of_what_it_replaces_from_the_start(
    tmp_path: Path, wanted: int, mask: int
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(wanted)
    before = os.umask(mask)
    try:
        with durable.new_file(path) as file:
            (temporary,) = tmp_path.glob(".file.*")
            assert mode(temporary) == wanted
            file.write(b"new")
        with durable.new_file(tmp_path / "fresh"):
            (temporary,) = tmp_path.glob(".fresh.*")
            assert mode(temporary) == 0o666 & ~mask
    finally:
        os.umask(before)
    assert mode(path) == wanted and path.read_text() == "new"


def test_at_no_instant_may_somebody_else_read_what_is_private(tmp_path: Path) -> None:
    """Every call that makes or changes a file is looked behind."""
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o600)
    code = """
import os, stat, sys
from pathlib import Path
from mlxlora_core.files import durable
target, seen = Path(sys.argv[1]), []
def look(event, arguments):
    if event != "os.listdir" and not event.startswith("glob"):
        for name in os.scandir(target.parent):
            if name.is_file() and "file" in name.name:
                seen.append(oct(stat.S_IMODE(name.stat().st_mode)))
busy = False
def hook(event, arguments):
    global busy
    if not busy and event in ("open", "os.rename", "os.chmod", "os.chown", "os.remove"):
        busy = True
        look(event, arguments)
        busy = False
sys.addaudithook(hook)
os.umask(0)
with durable.new_file(target) as file:
    file.write(b"new")
    look("", ())
print(set(seen))
"""
    done = run(code, path)
    assert done.stdout.strip() == "{'0o600'}", done.stderr


def test_a_folder_that_is_replaced_keeps_its_mode_and_those_of_its_files(tmp_path: Path) -> None:
    target = tmp_path / "target"
    build(target, "1")
    (target / "below").mkdir()
    (target / "below" / "file").write_text("1")
    for path, wanted in ((target, 0o750), (target / "mark", 0o600), (target / "below", 0o700)):
        path.chmod(wanted)
    (target / "below" / "file").chmod(0o640)
    with durable.new_folder(target, overwrite=True, ours=ours) as folder:
        assert mode(folder) == 0o700, "nobody looks into what is not there yet"
        for name in ("mark", "more", "fresh"):
            durable.write_text(folder / name, "2")
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("2")
    modes = {str(path.relative_to(tmp_path)): mode(path) for path in tmp_path.rglob("*")}
    fresh = 0o666 & ~umask()
    assert modes == {
        "target": 0o750,
        "target/mark": 0o600,
        "target/more": fresh,
        "target/fresh": fresh,
        "target/below": 0o700,
        "target/below/file": 0o640,
    }


def test_a_new_folder_has_the_mode_that_the_process_gives(tmp_path: Path) -> None:
    build(tmp_path / "target", "1")
    (tmp_path / "plain").mkdir()
    assert mode(tmp_path / "target") == mode(tmp_path / "plain")


def umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


# --- never absent -------------------------------------------------------------


def test_a_folder_that_is_replaced_is_there_at_every_instant(tmp_path: Path) -> None:
    """A reader that does nothing but look never misses it."""
    target = tmp_path / "target"
    build(target, "0")
    code = """
import os, sys
missed = looked = 0
while os.path.exists(sys.argv[2]):
    looked += 1
    try:
        os.stat(os.path.join(sys.argv[1], "mark"))
    except FileNotFoundError:
        missed += 1
print(missed, looked)
"""
    going = tmp_path / "going"
    going.touch()
    command = [sys.executable, "-c", code, str(target), str(going)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        for count in range(100):
            build(target, str(count), overwrite=True)
        going.unlink()
        missed, looked = map(int, reader.communicate(timeout=60)[0].split())
    assert missed == 0 and looked > 0


def test_where_names_cannot_change_places_the_old_folder_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "exchange", lambda one, other: False)
    target = tmp_path / "target"
    build(target, "1")
    build(target, "2", overwrite=True)
    assert (target / "more").read_text() == "2" and names(tmp_path) == ["target"]


def test_what_somebody_puts_into_a_folder_meanwhile_is_not_lost(tmp_path: Path) -> None:
    def only_ours(folder: Path) -> bool:
        return {path.name for path in folder.iterdir()} <= {"mark", "more"}

    target = tmp_path / "target"
    build(target, "1")
    with pytest.raises(SafetyError), durable.new_folder(target, overwrite=True, ours=only_ours) as folder:
        durable.write_text(folder / "mark", "2")
        (target / "notes").write_text("precious")
    assert names(target) == ["mark", "more", "notes"] and names(tmp_path) == ["target"]


# --- flushing -----------------------------------------------------------------

UNFLUSHED = """
import errno, os, stat, sys
from pathlib import Path
from mlxlora_core.errors import ResourceError
from mlxlora_core.files import durable
number, kinds = int(sys.argv[2]), sys.argv[3].split()
real = os.fsync
def fsync(descriptor):
    folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    if ("folder" if folder else "file") in kinds:
        raise OSError(number, os.strerror(number))
    real(descriptor)
os.fsync = fsync
try:
    with durable.new_folder(Path(sys.argv[1]) / "target") as folder:
        durable.write_text(folder / "mark", "1")
    durable.flush_files([Path(sys.argv[1]) / "target" / "mark"])
except ResourceError as fault:
    print(fault)
"""


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.ENOTSUP, errno.EBADF, errno.EROFS])
def test_a_folder_that_cannot_be_flushed_counts(tmp_path: Path, number: int) -> None:
    assert run(UNFLUSHED, tmp_path, str(number), "folder").stdout == ""
    assert names(tmp_path / "target") == ["mark"]


def test_a_file_counts_where_the_file_system_flushes_none_and_not_where_it_fails(tmp_path: Path) -> None:
    assert run(UNFLUSHED, tmp_path, str(errno.EINVAL), "file folder").stdout == ""
    (tmp_path / "other").mkdir()
    assert "cannot be written" in run(UNFLUSHED, tmp_path / "other", str(errno.EIO), "file").stdout
    assert names(tmp_path / "other") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every folder")
def test_a_folder_that_may_be_written_and_not_read_takes_a_file(tmp_path: Path) -> None:
    (tmp_path / "drop").mkdir()
    (tmp_path / "drop").chmod(0o300)
    durable.write_text(tmp_path / "drop" / "file", "1")
    assert (tmp_path / "drop" / "file").read_text() == "1"
    (tmp_path / "drop").chmod(0o700)


# --- what is looked at before long work ---------------------------------------


@pytest.mark.parametrize("check", [writable.check_file, writable.check_folder], ids=["file", "folder"])
def test_a_check_leaves_nothing_of_itself_nor_of_one_that_was_killed(tmp_path: Path, check: Check) -> None:
    check(tmp_path / "a" / "b" / "target")
    assert names(tmp_path) == []
    dead = tmp_path / temporary_name("target", 2**22 + 1, "tmp")
    dead.touch()
    (tmp_path / "mine").touch()
    check(tmp_path / "target")
    assert names(tmp_path) == ["mine"]


def test_a_check_of_a_folder_that_is_there_leaves_it(tmp_path: Path) -> None:
    writable.check_folder(tmp_path)
    assert tmp_path.is_dir() and names(tmp_path) == []


@pytest.mark.parametrize("check", [writable.check_file, writable.check_folder], ids=["file", "folder"])
def test_a_check_below_a_file_is_refused_and_leaves_nothing(tmp_path: Path, check: Check) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ResourceError, match="cannot be"):
        check(tmp_path / "mine" / "a" / "target")
    assert names(tmp_path) == ["mine"]


# --- one file of somebody else's ----------------------------------------------


def test_a_single_file_is_moved_to_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model.bin"
    asked: list[bool] = []
    with durable.new_single_file(target, lambda: asked.append(target.exists())) as folder:
        (folder / "any name").write_bytes(b"whole")
        assert not target.exists() and len(list(target.parent.iterdir())) == 1
    assert target.read_bytes() == b"whole" and asked == [False, False]
    assert list(target.parent.iterdir()) == [target]
    target.chmod(0o600)
    with durable.new_single_file(target, lambda: None) as folder:
        (folder / "another").write_bytes(b"new")
    assert target.read_bytes() == b"new" and mode(target) == 0o600


@pytest.mark.parametrize("fails", ["in the block", "after it"])
def test_a_single_file_that_fails_leaves_the_older_one(tmp_path: Path, fails: str) -> None:
    target, calls = tmp_path / "model.bin", 0
    target.write_bytes(b"old")

    def check() -> None:
        nonlocal calls
        calls += 1
        if fails == "after it" and calls == 2:
            raise SafetyError("somebody else's")

    def write() -> None:
        with durable.new_single_file(target, check) as folder:
            (folder / "model").write_bytes(b"new")
            if fails == "in the block":
                raise SafetyError("no")

    with pytest.raises(SafetyError):
        write()
    assert target.read_bytes() == b"old" and names(tmp_path) == ["model.bin"]


def test_a_process_that_dies_over_a_single_file_leaves_what_the_next_one_clears(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from mlxlora_core.files import durable
with durable.new_single_file(Path(sys.argv[1]), lambda: None) as folder:
    (folder / "model").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    target = tmp_path / "model.bin"
    run(code, target)
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    with durable.new_single_file(target, lambda: None) as folder:
        (folder / "model").write_bytes(b"whole")
    assert names(tmp_path) == ["model.bin"] and target.read_bytes() == b"whole"
