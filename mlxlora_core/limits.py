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
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.errors import UsageError

#: environment variable that overrides what is found here
THREADS = "MLXLORA_THREADS"
MOST_THREADS = 4096

ROOT = Path("/")  # of the file system; another one in tests


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


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors that control groups grant this process in time, such as 1.5; None without a limit."""
    granted = []
    for folder in _groups("cpu", root):
        quota = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and all(map(str.isdecimal, quota)) and int(quota[1]):
            granted.append(int(quota[0]) / int(quota[1]))
    return min(granted, default=None)


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """The memory that control groups let this process and its neighbours in the group take, or None."""
    return min((group.limit_bytes for group in _memory_groups(root)), default=None)


def free_memory_bytes(root: Path = ROOT) -> int | None:
    """How many bytes this process may take yet: the least of what machine, control groups and limits leave.

    Where the system does not tell what is available, the memory of the machine
    stands for it; None where it does not tell that either.
    """
    total, available = memory_bytes(root)
    rooms = [total if available is None else available, _address_space(root)]
    rooms += [group.limit_bytes - group.taken_bytes for group in _memory_groups(root)]
    known = [room for room in rooms if room is not None]
    return max(0, min(known)) if known else None


def memory_bytes(root: Path = ROOT) -> tuple[int | None, int | None]:
    """Memory that the machine has, and that is available without swapping; None where it does not say."""
    try:
        text = (root / "proc/meminfo").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines())
        return _kilobytes(lines["MemTotal"]), _kilobytes(lines["MemAvailable"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (OSError, ValueError, AttributeError):
        return None, None


@dataclass(frozen=True)
class _MemoryGroup:
    """A control group that limits memory: how much, and what its processes cannot give back of it."""

    limit_bytes: int
    taken_bytes: int


def _memory_groups(root: Path) -> Iterator[_MemoryGroup]:
    """Those that this process is in and that have a limit below the memory of the machine."""
    total = memory_bytes(root)[0]
    for folder in _groups("memory", root):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            allowed = _number(folder / limit)
            if allowed is not None and (total is None or allowed < total):  # version 1 says no limit as 2⁶³
                taken = (_number(folder / used) or 0) - _reclaimable(folder)
                yield _MemoryGroup(allowed, taken)


def _reclaimable(folder: Path) -> int:
    """The pages of files, which a group counts as its own and gives away when it needs room."""
    words = _words(folder / "memory.stat")
    stated = dict(zip(words[::2], words[1::2], strict=False))
    return int(stated.get("total_inactive_file", stated.get("inactive_file", 0)))


def _address_space(root: Path) -> int | None:
    """What RLIMIT_AS leaves of addresses."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = _words(root / "proc/self/statm")
    if allowed == resource.RLIM_INFINITY or not taken:
        return None
    return allowed - int(taken[0]) * resource.getpagesize()


def _kilobytes(text: str) -> int:
    """``"  12 kB"`` in bytes."""
    return int(text.split()[0]) * 1024


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the groups that this process is in for ``controller``, and of those above them.

    A container may show the path of its group as the host sees it, while the
    group itself is mounted as the root: the folders above cover that too.
    """
    hierarchy = root / "sys/fs/cgroup"
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for line in lines:
        if len(line) != 3 or (line[1] and controller not in line[1].split(",")):
            continue
        # Version 2 stands at the top, or beside version 1 in a folder of its own.
        names = (line[1], controller) if line[1] else ("", "unified")
        for mount in dict.fromkeys(hierarchy / name for name in names):
            group = mount / line[2].lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _number(file: Path) -> int | None:
    """The number in a file; None when there is no file, or it says that there is no limit."""
    words = _words(file)
    return int(words[0]) if len(words) == 1 and words[0].isdecimal() else None


def _words(file: Path) -> list[str]:
    """The words in a file; none when it is not there."""
    try:
        return file.read_text().split()
    except OSError:
        return []
