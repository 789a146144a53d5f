"""Memory: how much this process may take, and whether work will find enough of it.

Before long work both figures are said, and work that cannot end well is refused
before it has written anything. Source for ``/proc/meminfo``: proc_meminfo(5).
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.errors import ResourceError
from mlxlora_core.machine.control_groups import ROOT, control_groups, read_number, read_words
from mlxlora_core.machine.limits import readable_bytes


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
    for folder in control_groups("memory", root):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            allowed = read_number(folder / limit)
            if allowed is not None and (total is None or allowed < total):  # version 1 says no limit as 2⁶³
                taken = (read_number(folder / used) or 0) - _reclaimable(folder)
                yield _MemoryGroup(allowed, taken)


def _reclaimable(folder: Path) -> int:
    """The pages of files, which a group counts as its own and gives away when it needs room."""
    words = read_words(folder / "memory.stat")
    stated = dict(zip(words[::2], words[1::2], strict=False))
    return int(stated.get("total_inactive_file", stated.get("inactive_file", 0)))


def _address_space(root: Path) -> int | None:
    """What RLIMIT_AS leaves of addresses."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = read_words(root / "proc/self/statm")
    if allowed == resource.RLIM_INFINITY or not taken:
        return None
    return allowed - int(taken[0]) * resource.getpagesize()


def _kilobytes(text: str) -> int:
    """``"  12 kB"`` in bytes."""
    return int(text.split()[0]) * 1024


def require_memory(need: int, work: str, fix: str) -> str:
    """What ``work`` will need of memory and what is free, in words.

    Args:
        need: bytes, beyond what this process holds.
        work: what needs them.
        fix: what the user can do about it.

    Raises:
        ResourceError: less is free.
    """
    free = free_memory_bytes()
    if free is None:
        return f"{work} needs about {readable_bytes(need)} of memory"
    if need > free:
        raise ResourceError(
            f"{work} needs about {readable_bytes(need)} of memory, {readable_bytes(free)} are free", fix=fix
        )
    return f"{work} needs about {readable_bytes(need)} of memory, {readable_bytes(free)} are free"
