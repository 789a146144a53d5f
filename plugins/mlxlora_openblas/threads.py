"""How many threads this process may keep busy."""

from __future__ import annotations

import os
from pathlib import Path

from mlxlora_core.api import UsageError

#: environment variable that overrides what is found here
THREADS = "MLXLORA_THREADS"
_MOST = 4096


def thread_count() -> int:
    """``MLXLORA_THREADS``, else the processors that affinity and cgroup quota leave to this process.

    Raises:
        UsageError: ``MLXLORA_THREADS`` is no whole number from 1 to 4096.
    """
    given = os.environ.get(THREADS)
    if not given:
        return min(len(os.sched_getaffinity(0)), quota())
    if not (given.isascii() and given.isdecimal() and 1 <= int(given) <= _MOST):
        raise UsageError(f"wanted a whole number from 1 to {_MOST}, got '{given}'", where=THREADS)
    return int(given)


def quota(membership: Path = Path("/proc/self/cgroup"), hierarchy: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole processors that cgroup v2 grants this process; 4096 when it sets no limit.

    The group of the process and every group above it may set ``cpu.max``, as
    ``QUOTA PERIOD`` or ``max PERIOD`` in microseconds; the tightest counts.
    Source: Linux, Documentation/admin-guide/cgroup-v2.rst, "CPU Interface Files".
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return _MOST
    group = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    folder = hierarchy / group
    limits = [_limit(above / "cpu.max") for above in (folder, *folder.parents)]
    return max(1, int(min(limits)))


def _limit(file: Path) -> float:
    """Processors that one ``cpu.max`` grants."""
    try:
        quota_us, period_us = file.read_text().split()
    except (OSError, ValueError):
        return _MOST
    return _MOST if quota_us == "max" else int(quota_us) / int(period_us)
