"""How much is needed and how much is free, against what is measured and what the system says."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxlora_core.errors import ExitCode, ResourceError
from mlxlora_core.machine import memory
from mlxlora_core.machine.disk import require_disk
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.memory import require_memory

# --- what running out looks like ----------------------------------------------


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EMFILE", "ENFILE", "EACCES", "EIO"])
def test_a_limit_of_the_system_is_6_and_names_the_file(name: str) -> None:
    number = getattr(errno, name)
    found = exhausted(OSError(number, os.strerror(number), "some/file"))
    assert found is not None and found.exit_code == ExitCode.RESOURCE == 6
    assert str(found).startswith(f"some/file: {os.strerror(number)}. Fix: ")


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        RuntimeError("[malloc] Unable to allocate 17179869184 bytes."),
        RuntimeError(
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
        ),
        RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
        RuntimeError(
            "[metal::malloc] Attempting to allocate 99 bytes which is greater than "
            "the maximum allowed buffer size of 9 bytes."
        ),
    ],
)
def test_no_memory_is_6_however_it_is_said(fault: Exception) -> None:
    assert "there is not enough memory" in str(exhausted(fault))


def test_a_name_that_is_too_long_is_bad_input_and_no_limit() -> None:
    found = exhausted(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300))
    assert found is not None and found.exit_code == ExitCode.USAGE == 2
    assert str(found) == f"{'x' * 300}: File name too long. Fix: choose a shorter name"


def test_a_gpu_that_gives_up_is_6() -> None:
    fault = RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:...)")
    assert str(exhausted(fault)).startswith("the GPU gave up: [METAL] Command buffer")


@pytest.mark.parametrize(
    "fault", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "none"), ValueError("no memory")]
)
def test_other_faults_are_what_they_are(fault: Exception) -> None:
    assert exhausted(fault) is None


# --- disk ---------------------------------------------------------------------


def test_a_disk_is_asked_where_the_target_will_be(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    said = require_disk(10**6, tmp_path / "not" / "yet" / "there")
    assert said.startswith(f"{tmp_path / 'not' / 'yet' / 'there'} needs 1.00 MB of disk, ")
    with pytest.raises(ResourceError, match=r"GB of disk are needed, .* are free. Fix: free some space"):
        require_disk(free + 10**10, tmp_path / "there")


# --- memory -------------------------------------------------------------------


def test_more_than_there_is_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process holds is in both."""
    room = memory._Room(held=500_000_000, free=2_000_000_000, kind="memory")
    monkeypatch.setattr(memory, "_rooms", lambda root: [room])
    words = "it needs about 2.50 GB of memory in all, 2.50 GB can be had"
    assert require_memory(2_000_000_000, "it", "") == words
    with pytest.raises(
        ResourceError, match=r"^it needs about 3\.50 GB of memory in all, 2\.50 GB can be had. Fix: rest$"
    ):
        require_memory(3_000_000_000, "it", "rest")
    monkeypatch.setattr(memory, "_rooms", lambda root: [])
    assert require_memory(10**15, "it", "") == "it needs about 1000000.00 GB of memory"


def test_the_figures_are_of_what_is_nearest_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process holds more addresses than memory, and a machine may have little beside its limit."""
    addresses = memory._Room(900, 1000, "addresses (ulimit -v)")
    for free, words in ((10_000, "of addresses \\(ulimit -v\\) in all"), (300, "of memory in all")):
        rooms = [memory._Room(100, free, "memory"), addresses]
        monkeypatch.setattr(memory, "_rooms", lambda root, rooms=rooms: rooms)
        with pytest.raises(ResourceError, match=words):
            require_memory(1001, "it", "")


@pytest.mark.parametrize(
    ("told", "free"),
    [
        ({"free_memory": 700, "total_memory": 1000}, 700),
        ({"max_recommended_working_set_size": 900, "memory_size": 1000}, 600),
        ({"memory_size": 1000}, 700),
    ],
    ids=["CUDA", "Metal", "Metal, of old"],
)
def test_on_a_gpu_it_is_the_memory_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, int], free: int
) -> None:
    gpu = SimpleNamespace(
        default_device=lambda: SimpleNamespace(type="gpu"),
        DeviceType=SimpleNamespace(cpu="cpu"),
        device_info=lambda: told,
        get_active_memory=lambda: 300,
        get_cache_memory=lambda: 0,
    )
    monkeypatch.setitem(sys.modules, "mlx.core", gpu)
    monkeypatch.setattr(memory, "_rooms", lambda root: [memory._Room(0, 10**9, "memory")])
    assert memory._device_room() == [memory._Room(300, free, "GPU memory")]
    require_memory(free, "it", "")
    with pytest.raises(ResourceError, match="of GPU memory in all"):
        require_memory(free + 1, "it", "")


def test_a_library_that_finds_no_room_is_6() -> None:
    fault = ImportError("libgomp.so.1: failed to map segment from shared object")
    assert "there is not enough memory" in str(exhausted(fault))
    assert exhausted(ImportError("libgomp.so.1: cannot open shared object file")) is None
