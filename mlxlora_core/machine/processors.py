"""Processors that this process may use, and threads to compute with."""

from __future__ import annotations

import os
from pathlib import Path

from mlxlora_core.errors import UsageError
from mlxlora_core.machine.control_groups import ROOT, control_groups, read_words

#: environment variable that overrides what is found here
THREADS = "MLXLORA_THREADS"

MOST_THREADS = 4096


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
    for folder in control_groups("cpu", root):
        quota = read_words(folder / "cpu.max") or [
            *read_words(folder / "cpu.cfs_quota_us"),
            *read_words(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and all(map(str.isdecimal, quota)) and int(quota[1]):
            granted.append(int(quota[0]) / int(quota[1]))
    return min(granted, default=None)
