"""The start of a rank: it meets the others, and MLX joins them, all within a stated time.

MLX waits for ever for a rank that does not come, and lets nothing else be done meanwhile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from mlxlora_core.distributed import environment
from mlxlora_core.distributed.meeting import Ranks, go, listening, receive
from mlxlora_core.errors import RankError, bounded

#: for which MLX may take to join ranks that are there
JOIN_SECONDS = 20.0
_FIX = "see whether their machines can reach one another, and start again"

# Ends the process that has started this one, unless its input ends before.
_GUARD = """
import os, select, sys
parent, seconds, line = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
if not select.select([0], [], [], seconds)[0] and os.getppid() == parent:
    os.write(2, line.encode())
    os.kill(parent, 9)
"""


@contextmanager
def joining() -> Iterator[None]:
    """Meet the other ranks, and then do the block, in which MLX joins them.

    Where MLX does not come back, the process is ended from outside, by SIGKILL and with a line.

    Raises:
        RankError: one of them has not come in time, or MLX cannot join them.
        UsageError: the environment contradicts itself, or the port to meet at is taken.
    """
    met_before()
    what = f"the ranks did not join within {JOIN_SECONDS:.0f} s"
    line = f"mlxlora: {bounded(f'{what}. Fix: {_FIX}')}\n"
    command = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), str(JOIN_SECONDS), line]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
    with guard:  # its input ends with the block
        try:
            yield
        except (RuntimeError, ValueError) as fault:
            raise RankError(f"the ranks cannot join: {fault}", fix=_FIX) from fault


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
