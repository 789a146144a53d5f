"""What this process may take of the machine: processors and memory.

A container or a batch system gives a process less than the machine has. Linux
keeps such limits in control groups: the group of the process and every group
above it may set one, and the tightest counts. Version 1 mounts a hierarchy for
each kind of limit, version 2 one for all; a machine may have both.

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst ("CPU Interface Files",
"Memory Interface Files"), cgroup-v1/memory.rst and scheduler/sched-bwc.rst;
cgroups(7) for ``/proc/self/cgroup``; proc_meminfo(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mlxlora_core.errors import UsageError

#: environment variable that overrides what is found here
THREADS = "MLXLORA_THREADS"
MOST_THREADS = 4096

MEMBERSHIP = Path("/proc/self/cgroup")
HIERARCHY = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def thread_count() -> int:
    """How many threads to compute with: ``MLXLORA_THREADS``, else what affinity and quota leave.

    Raises:
        UsageError: ``MLXLORA_THREADS`` is no whole number from 1 to 4096.
    """
    given = os.environ.get(THREADS)
    if not given:
        return max(1, int(min(processors(), cpu_quota() or MOST_THREADS)))
    if not (given.isascii() and given.isdecimal() and 1 <= int(given) <= MOST_THREADS):
        raise UsageError(f"wanted a whole number from 1 to {MOST_THREADS}, got '{given}'", where=THREADS)
    return int(given)


def processors() -> int:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(membership: Path = MEMBERSHIP, hierarchy: Path = HIERARCHY) -> float | None:
    """Processors that control groups grant this process in time, such as 1.5; None without a limit."""
    granted = []
    for folder in _groups("cpu", membership, hierarchy):
        quota = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and all(map(str.isdecimal, quota)) and int(quota[1]):
            granted.append(int(quota[0]) / int(quota[1]))
    return min(granted, default=None)


def memory_limit_bytes(membership: Path = MEMBERSHIP, hierarchy: Path = HIERARCHY) -> int | None:
    """The memory that control groups let this process and its neighbours in the group take, or None."""
    total = memory_bytes()[0]
    granted = [
        int(word)
        for folder in _groups("memory", membership, hierarchy)
        for name in ("memory.max", "memory.limit_in_bytes")
        for word in _words(folder / name)
        if word.isdecimal() and (total is None or int(word) < total)  # version 1 says no limit as 2⁶³
    ]
    return min(granted, default=None)


def memory_bytes(meminfo: Path = MEMINFO) -> tuple[int | None, int | None]:
    """Memory that the machine has, and that is available without swapping; None where it does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return _kilobytes(lines["MemTotal"]), _kilobytes(lines["MemAvailable"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (OSError, ValueError, AttributeError):
        return None, None


def _kilobytes(text: str) -> int:
    """``"  12 kB"`` in bytes."""
    return int(text.split()[0]) * 1024


def _groups(controller: str, membership: Path, hierarchy: Path) -> Iterator[Path]:
    """The folders of the groups that this process is in for ``controller``, and of those above them.

    A container may show the path of its group as the host sees it, while the
    group itself is mounted as the root: the folders above cover that too.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for line in lines:
        if len(line) != 3 or (line[1] and controller not in line[1].split(",")):
            continue
        # Version 2 stands at the top, or beside version 1 in a folder of its own.
        names = (line[1], controller) if line[1] else ("", "unified")
        for mount in (hierarchy / name for name in names):
            group = mount / line[2].lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _words(file: Path) -> list[str]:
    """The words in a file; none when it is not there."""
    try:
        return file.read_text().split()
    except OSError:
        return []
