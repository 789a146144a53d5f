"""How much is needed and how much is free, against what is measured and what the system says."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

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
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 2_000_000_000)
    assert require_memory(1_999_999_999, "it", "") == "it needs about 2.00 GB of memory, 2.00 GB are free"
    with pytest.raises(
        ResourceError, match=r"^it needs about 3\.00 GB of memory, 2\.00 GB are free. Fix: rest$"
    ):
        require_memory(3_000_000_000, "it", "rest")
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: None)
    assert require_memory(10**15, "it", "") == "it needs about 1000000.00 GB of memory"
