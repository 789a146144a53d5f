"""The start of a rank: it meets the others, and MLX joins them, all within a stated time.

MLX waits for ever for a rank that does not come, and lets nothing else be done meanwhile.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from mlxlora_core.distributed import environment
from mlxlora_core.distributed.environment import Meeting
from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.distributed.meeting import Ranks, go, listening, own_addresses, receive
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


@cache
def join() -> Group:
    """The group that this process was started in, joined once; :data:`ALONE` where it was started by itself.

    :func:`~mlxlora_core.distributed.watch.watching` is to follow at once.

    Raises:
        RankError: another rank has not come in time, or MLX cannot join them.
        UsageError: the environment contradicts itself, or the port to meet at is taken.
    """
    if not environment.is_rank():
        return ALONE
    import mlx.core as mx

    with joining():
        group = mx.distributed.init(strict=True)
    return Group(group.rank(), group.size())


@contextmanager
def joining() -> Iterator[None]:
    """Meet the other ranks, and then do the block, in which MLX joins them.

    Where MLX does not come back, the process is ended from outside, by SIGKILL and with a line.

    Raises:
        RankError: one of them has not come in time, or MLX cannot join them.
        UsageError: the environment contradicts itself, or the port to meet at is taken.
    """
    _met_before()
    what = f"the ranks did not join within {JOIN_SECONDS:.0f} s"
    line = f"mlxlora: {bounded(f'{what}. Fix: {_FIX}')}\n"
    command = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), str(JOIN_SECONDS), line]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
    with guard:  # its input ends with the block
        try:
            yield
        except (RuntimeError, ValueError) as fault:
            raise RankError(f"the ranks cannot join: {fault}", fix=_FIX) from fault


def met(group: Group) -> Ranks:
    """The other ranks of a group that this process has joined.

    Raises:
        RankError: as :func:`joining`.
    """
    return _met_before() or _meet_by_message(group)


@cache
def _met_before() -> Ranks | None:
    """The ranks met at the place that the environment names; None where it names none."""
    place = environment.meeting()
    if place is None:
        return None
    rank = environment.rank()
    if rank != 0:
        return go(place, rank)
    return receive(listening(place.hosts[0], place.port), environment.size(), place.proof)


def _meet_by_message(group: Group) -> Ranks:
    """The ranks met at a place that rank 0 tells by a message of MLX."""
    if group.rank != 0:
        told = json.loads(group.share(b"")[0])
        return go(Meeting(tuple(told["hosts"]), told["port"], told["proof"]), group.rank)
    server, proof = listening("", 0), secrets.token_hex(16)
    port = server.getsockname()[1]
    group.share(json.dumps({"hosts": own_addresses(), "port": port, "proof": proof}).encode())
    return receive(server, group.size, proof)
