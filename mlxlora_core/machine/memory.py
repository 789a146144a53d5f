"""Memory: how much this process may take, and whether work will find enough of it.

Before long work both figures are said, and work that cannot end well is refused
before it has written anything. Source for ``/proc/meminfo``: proc_meminfo(5).
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlxlora_core.errors import ResourceError
from mlxlora_core.machine.control_groups import ROOT, control_groups, read_number, read_words
from mlxlora_core.machine.limits import readable_bytes
from mlxlora_core.machine.processors import thread_count

# Addresses that loading takes: for libraries and what they hold, and for each thread to compute with its
# stack, a heap of the C library, and buffers of BLAS. Measured with mlx 0.32.4 and OpenBLAS 0.3.34.
_START_BYTES, _THREAD_BYTES = 320 << 20, 112 << 20

#: of that, what a thread takes only when it first computes
_LATER_BYTES = 48 << 20

#: memory that loading takes
_LOADED_BYTES = 56 << 20

_sharing: tuple[int, ...] = ()


@contextmanager
def shared_by(processes: Sequence[int]) -> Iterator[None]:
    """Inside, the memory of the machine and of control groups is to be enough for several processes alike.

    What all of them hold and what is free, divided by their number, is what each may hold.

    Args:
        processes: by their numbers, this one among them; others of them do the same work.
    """
    global _sharing
    before, _sharing = _sharing, tuple(processes)
    try:
        yield
    finally:
        _sharing = before


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """The memory that control groups let this process and its neighbours in the group take, or None."""
    return min((group.limit_bytes for group in _memory_groups(root)), default=None)


def free_memory_bytes(root: Path = ROOT) -> int | None:
    """How many bytes this process may take yet: the least of what machine, control groups and limits leave.

    Of what it shares with other ranks (:func:`shared_by`), its part.

    Where the system does not tell what is available, the memory of the machine
    stands for it; None where it does not tell that either.
    """
    return min((room.free for room in _rooms(root)), default=None)


def free_in_groups_bytes(root: Path = ROOT) -> int | None:
    """What control groups that limit memory leave this process, or None."""
    room = _room_in_groups(root)
    return None if room is None else room.free


def require_start() -> None:
    """Refuse to load MLX where limits leave too little for it, numpy and their threads.

    An OpenBLAS that gets no addresses ends the process with 1 and a line of its
    own. So that it takes fewer where ``ulimit -v`` limits them, numpy's own has
    one thread.

    Raises:
        ResourceError: there is too little.
    """
    if "mlx.core" in sys.modules:
        return
    if free_in_groups_bytes() is not None:
        require_memory(_LOADED_BYTES, "mlxlora", "allow its control group more")
    if _address_space(ROOT) is None:
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    require_memory(_START_BYTES + thread_count() * _THREAD_BYTES, "mlxlora", "raise ulimit -v")


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

    folder: Path
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
                yield _MemoryGroup(folder, allowed, taken)


def _reclaimable(folder: Path) -> int:
    """The pages of files, which a group counts as its own and gives away when it needs room."""
    words = read_words(folder / "memory.stat")
    stated = dict(zip(words[::2], words[1::2], strict=False))
    return int(stated.get("total_inactive_file", stated.get("inactive_file", 0)))


@dataclass(frozen=True)
class _Room:
    """What there is of one kind of memory: how much of it this process holds, and may take yet.

    So may each of the ``ranks`` that share it.
    """

    held: int
    free: int
    kind: str
    ranks: int = 1


def _rooms(root: Path) -> list[_Room]:
    """All kinds that are known."""
    addresses, _ = _held(root)
    total, available = memory_bytes(root)
    machine = total if available is None else available
    rooms = [] if machine is None else [_shared_room(machine, _sharing, root)]
    in_groups = _room_in_groups(root)
    if in_groups is not None:
        rooms.append(in_groups)
    space = _address_space(root)
    if space is not None:
        later = thread_count() * _LATER_BYTES
        rooms.append(_Room(addresses + later, max(0, space - later), "addresses (ulimit -v)"))
    return rooms


def _room_in_groups(root: Path) -> _Room | None:
    """What the tightest control group leaves, shared by the ranks that are in it; None without a limit."""
    rooms = []
    for group in _memory_groups(root):
        inside = [rank for rank in _sharing if group.folder in control_groups("memory", root, rank)]
        rooms.append(_shared_room(max(0, group.limit_bytes - group.taken_bytes), inside, root))
    return min(rooms, key=lambda room: room.free, default=None)


def _shared_room(free: int, processes: Sequence[int], root: Path) -> _Room:
    """A kind of memory of which so much is free, for those that share it."""
    _, own = _held(root)
    count = max(1, len(processes))
    if count > 1:
        whole = free + sum(_held(root, process)[1] for process in processes)
        free = max(0, min(free, whole // count - own))
    return _Room(own, free, "memory", count)


def _held(root: Path, process: int | None = None) -> tuple[int, int]:
    """Bytes of addresses and of memory that a process holds, or this one; 0 where nobody says."""
    taken = read_words(root / f"proc/{process or 'self'}/statm") or ["0", "0"]
    return int(taken[0]) * resource.getpagesize(), int(taken[1]) * resource.getpagesize()


def _address_space(root: Path) -> int | None:
    """What RLIMIT_AS leaves of addresses."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    addresses, _ = _held(root)
    return None if allowed == resource.RLIM_INFINITY or not addresses else allowed - addresses


def _kilobytes(text: str) -> int:
    """``"  12 kB"`` in bytes."""
    return int(text.split()[0]) * 1024


def require_memory(need: int, work: str, fix: str) -> str:
    """What ``work`` will need of memory, with what this process holds, and what it may have, in words.

    Where addresses are limited (``ulimit -v``) and are what is nearest to its
    end, the figures are of addresses, and else of memory.

    Args:
        need: bytes, beyond what this process holds.
        work: what needs them.
        fix: what the user can do about it.

    Raises:
        ResourceError: less is free.
    """
    rooms = [*_rooms(ROOT), *_device_room()]
    if not rooms:
        return f"{work} needs about {readable_bytes(need)} of memory"
    tight = max(rooms, key=lambda room: (room.held + need) / max(1, room.held + room.free))
    each = f" by each of the {tight.ranks} ranks of this machine" if tight.ranks > 1 else ""
    said = (
        f"{work} needs about {readable_bytes(tight.held + need)} of {tight.kind} in all, "
        f"{readable_bytes(tight.held + tight.free)} can be had{each}"
    )
    if need > tight.free:
        raise ResourceError(said, fix=fix)
    return said


def _device_room() -> list[_Room]:
    """The memory of a GPU, where MLX computes on one and tells of it."""
    mx = sys.modules.get("mlx.core")  # whoever has not loaded it does not use it
    if mx is None or mx.default_device().type == mx.DeviceType.cpu:
        return []
    told, held = mx.device_info(), mx.get_active_memory()
    most = told.get("max_recommended_working_set_size") or told.get("memory_size")
    ranks = max(1, len(_sharing))  # on the one GPU of a Mac; where there are several, each has its own
    free = told.get("free_memory", most // ranks - held if most else None)
    # What MLX keeps for reuse it gives away when it needs room.
    return [] if free is None else [_Room(held, max(0, int(free) + mx.get_cache_memory()), "GPU memory")]
