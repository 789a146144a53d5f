"""What control groups, affinity and the environment leave to a process, on file trees as Linux shows them."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_machine import machine

from mlxlora_core.machine import memory
from mlxlora_core.machine.memory import (
    free_in_groups_bytes,
    free_memory_bytes,
    memory_bytes,
    memory_limit_bytes,
    shared_by,
)
from mlxlora_core.machine.processors import cpu_quota


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"a/b/cpu.max": "max 100000"}, None),
        ({"a/b/cpu.max": "250000 100000"}, 2.5),
        ({"a/b/cpu.max": "50000 100000"}, 0.5),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ({"cpu.max": "100000 100000", "a/b/cpu.max": "800000 100000"}, 1),
        ({"a/c/cpu.max": "100000 100000"}, None),  # a group beside it is none of its business
        ({"unified/a/b/cpu.max": "150000 100000"}, 1.5),
        ({"a/b/cpu.max": "damaged"}, None),
        ({"a/b/cpu.max": "100000 0"}, None),
    ],
)
def test_the_tightest_quota_of_a_group_and_those_above_it_counts(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(machine(tmp_path, "4:memory:/x\n0::/a/b\n", files)) == quota


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("2:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "100000"}, 1.5),
        ("2:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        (
            "2:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "30000", "cpu,cpuacct/cpu.cfs_period_us": "10000"},
            3,
        ),
        # inside a container: the host's path, while the group itself is mounted as the root
        ("2:cpu:/docker/f00\n", {"cpu/cpu.cfs_quota_us": "20000", "cpu/cpu.cfs_period_us": "10000"}, 2),
        ("2:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_version_1_has_its_quota_in_two_files(
    tmp_path: Path, membership: str, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(machine(tmp_path, membership, files)) == quota


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/a\n", {"a/memory.max": "1000000"}, 1000000),
        ("0::/a\n", {"a/memory.max": "max"}, None),
        ("0::/a\n", {"a/memory.max": "max", "memory.max": "2000000"}, 2000000),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "3000000"}, 3000000),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "3000000", "memory.max": "7"}, 7),
    ],
)
def test_memory_limits_of_either_version(
    tmp_path: Path, membership: str, files: dict[str, str], limit: int | None
) -> None:
    assert memory_limit_bytes(machine(tmp_path, membership, files)) == limit


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert memory_limit_bytes(tmp_path) is None


def test_memory_is_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  24000 kB\nMemFree: 1 kB\nMemAvailable:  12000 kB\n")
    assert memory_bytes(tmp_path) == (24000 * 1024, 12000 * 1024)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes(tmp_path / "none") == (pages, None)


# --- free memory ---------------------------------------------------------------


def fake(root: Path, **files: str) -> Path:
    """A root with files; the name of one has ``__`` for ``/``."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 8000 kB\n"


def test_what_the_machine_has_is_the_most(tmp_path: Path) -> None:
    assert free_memory_bytes(fake(tmp_path, proc__meminfo=MEMINFO)) == 8000 * 1024


def test_the_tightest_of_all_control_groups_counts(tmp_path: Path) -> None:
    root = fake(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="1:cpu,cpuacct:/x\n0::/job/step\n",
        sys__fs__cgroup__job__memory="",
    )
    top = root / "sys/fs/cgroup/job"
    shutil.rmtree(top)
    (top / "step").mkdir(parents=True)
    (top / "step" / "memory.max").write_text("max\n")
    (top / "step" / "memory.current").write_text("1000000\n")
    assert free_memory_bytes(root) == 8000 * 1024, "a group without a limit"
    (top / "memory.max").write_text("5000000\n")
    (top / "memory.current").write_text("4000000\n")
    assert free_memory_bytes(root) == 1000000
    (top / "memory.stat").write_text("anon 5\ninactive_file 300000\nactive_file 7\n")
    assert free_memory_bytes(root) == 1300000, "pages of files are given away"
    (top / "step" / "memory.max").write_text("1000010\n")
    assert free_memory_bytes(root) == 10
    (top / "step" / "memory.current").write_text("2000000\n")
    assert free_memory_bytes(root) == 0


def test_groups_of_the_old_kind(tmp_path: Path) -> None:
    root = fake(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="4:memory,hugetlb:/job\n0::/\n")
    folder = root / "sys/fs/cgroup/memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (folder / "memory.usage_in_bytes").write_text("7\n")
    assert free_memory_bytes(root) == 8000 * 1024
    (folder / "memory.limit_in_bytes").write_text("5007\n")
    assert free_memory_bytes(root) == 5000


def test_a_limit_of_addresses_counts() -> None:
    code = "from mlxlora_core.machine.memory import free_memory_bytes; print(free_memory_bytes())"
    done = subprocess.run(
        ["prlimit", f"--as={600 << 20}", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert 400 << 20 < int(done.stdout) < 600 << 20


def test_where_nothing_is_told_it_is_the_memory_of_the_machine(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- ranks of one machine ------------------------------------------------------


def test_ranks_share_what_they_hold_and_what_is_free(tmp_path: Path) -> None:
    page, free = resource.getpagesize(), 8000 * 1024
    root = fake(tmp_path, proc__meminfo=MEMINFO, proc__self__statm="9 100", proc__7__statm="9 100")
    fake(root, proc__8__statm="9 500")
    with shared_by([7]):
        assert free_memory_bytes(root) == free
    with shared_by([7, 8]):
        assert free_memory_bytes(root) == (free + 600 * page) // 2 - 100 * page
        fake(root, proc__self__statm="9 900", proc__7__statm="9 900")
        assert free_memory_bytes(root) == (free + 1400 * page) // 2 - 900 * page
        fake(root, proc__self__statm="9 9000", proc__7__statm="9 9000")
        assert free_memory_bytes(root) == 0, "it holds more than its part"
        fake(root, proc__self__statm="9 1", proc__7__statm="9 1", proc__8__statm="9 9000")
        assert free_memory_bytes(root) == free, "another one does; no more is free all the same"
    assert free_memory_bytes(root) == free


def test_ranks_share_the_control_groups_that_they_are_in_together(tmp_path: Path) -> None:
    own = {f"proc__{name}__cgroup": "0::/job/own\n" for name in ("self", "7")}
    root = fake(tmp_path, proc__meminfo=MEMINFO, **own, proc__8__cgroup="0::/job/other\n")
    for folder, limit in (("job/own", 3000), ("job", 5000)):
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text("0\n")
    assert free_memory_bytes(root) == free_in_groups_bytes(root) == 3000
    with shared_by([7, 8]):
        assert free_memory_bytes(root) == free_in_groups_bytes(root) == 2500, (
            "all of its own, half of the job's"
        )


def test_ranks_are_told_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_rooms", lambda root: [memory._Room(10**6, 10**6, "memory", 3)])
    words = (
        "it needs about 1.50 MB of memory in all, 2.00 MB can be had by each of the 3 ranks of this machine"
    )
    assert memory.require_memory(500_000, "it", "fix") == words
