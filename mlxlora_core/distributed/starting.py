"""The start of a rank: it meets the others, and MLX joins them, all within a stated time.

MLX waits for ever for a rank that does not come, and lets nothing else be done meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from mlxlora_core.distributed import environment
from mlxlora_core.distributed.meeting import Ranks, go, listening, receive
from mlxlora_core.errors import ExitCode, RankError, bounded
from mlxlora_core.machine.signals import undeferred

#: for which MLX may take to join ranks that are there
JOIN_SECONDS = 20.0
_FIX = "see whether their machines can reach one another, and start again"

# Ends the process that has started this one, unless its input ends before, as it does with that process.
_GUARD = """
import os, select, sys
parent, code, seconds, line = *map(int, sys.argv[1:3]), float(sys.argv[3]), sys.argv[4]
if not select.select([0], [], [], seconds)[0] and os.getppid() == parent:
    os.write(2, line.encode())
    for signum in (code, 9):
        os.kill(parent, signum)
        if select.select([0], [], [], 2)[0]:
            break
"""


@contextmanager
def joining() -> Iterator[None]:
    """Meet the other ranks, and then do the block, in which MLX joins them.

    Where MLX does not come back, the process is ended from outside, with a line. A signal ends it at once.

    Raises:
        RankError: one of them has not come in time, or MLX cannot join them.
        UsageError: the environment contradicts itself, or the port to meet at is taken.
    """
    met = met_before()
    what = f"the ranks did not join within {JOIN_SECONDS:.0f} s"
    line = f"mlxlora: {bounded(f'{what}. Fix: {_FIX}')}\n"
    arguments = [str(os.getpid()), str(int(ExitCode.RANK)), str(JOIN_SECONDS), line]
    command = [sys.executable, "-I", "-S", "-c", _GUARD, *arguments]
    with _ended_by_signal(), subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0):
        try:
            with undeferred():
                yield
        except (RuntimeError, ValueError) as fault:
            cannot = RankError(f"the ranks cannot join: {fault}", fix=_FIX)
            if met is not None:
                met.tell_left("the start", cannot)
            raise cannot from fault


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Inside, the signal with the number of :attr:`ExitCode.RANK` ends this process with that exit code.

    While MLX holds it no Python runs, but a handler of C does. Such a one is called with the number of its
    signal, and ``_exit`` with an exit code. Source: signal(2), _exit(2).
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = libc.signal(ExitCode.RANK, ctypes.cast(libc._exit, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(ExitCode.RANK, before)


@cache
def met_before() -> Ranks | None:
    """The ranks met at the place that the environment names; None where it names none.

    Raises:
        RankError: as :func:`joining`.
        UsageError: as :func:`joining`.
    """
    place = environment.meeting()
    if place is None:
        return None
    rank = environment.rank()
    if rank != 0:
        return go(place, rank)
    return receive(listening(place.hosts[0], place.port), environment.size(), place.proof)
