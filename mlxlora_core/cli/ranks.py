"""A verb whose work several processes share: the options that start them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxlora_core.cli import declare
from mlxlora_core.distributed.environment import is_rank, size
from mlxlora_core.errors import UsageError
from mlxlora_core.machine.processors import processors

if TYPE_CHECKING:
    from mlxlora_core.distributed.hosts import Hosts

OPTIONS = declare.section(
    "Several machines",
    click.option(
        "-n",
        "--ranks",
        type=click.IntRange(min=1),
        metavar="RANKS",
        help="Share the work out to so many processes on this machine.",
    ),
    click.option(
        "--hosts",
        type=declare.INPUT,
        help="Share it out to the machines in this file, as mlx.launch --hostfile reads it: a process on "
        "each, by ssh. This machine comes first.",
    ),
)

_RANKS_A_PROCESSOR = 4  # more only wait for one another


def launched(ranks: int | None, hosts: Path | None) -> int | None:
    """The exit code of the processes that the options ask for; None where the work is this process's.

    Raises:
        UsageError: the options contradict each other, or the file of hosts cannot be used.
        RankError: a rank was lost.
    """
    asked = _asked(ranks, hosts)
    if is_rank():
        if asked is not None and len(asked.ranks) != size():
            what = f"this process is one of {size()} ranks, and the options ask for {len(asked.ranks)}"
            raise UsageError(what, fix="leave out -n and --hosts inside of mlx.launch and mpirun")
        return None
    if asked is None or len(asked.ranks) == 1:
        return None
    from mlxlora_core.cli.verbs import is_debugged
    from mlxlora_core.distributed.launch import launch

    return launch(asked, sys.argv[1:], debug=is_debugged(sys.argv[1:]))


def _asked(ranks: int | None, hosts: Path | None) -> Hosts | None:
    from mlxlora_core.distributed.hosts import here, read_hosts

    if ranks is not None and hosts is not None:
        raise UsageError("-n shares work out on this machine and --hosts to several; give one of them")
    if ranks is not None:
        fewer = "ask for fewer; the option for how many tokens to generate is --num-tokens"
        _require_possible(ranks, "-n", fewer)
        return here(ranks)
    if hosts is None:
        return None
    found = read_hosts(hosts)
    _require_possible(sum(host.is_here for host in found.ranks), str(hosts), "name it less often")
    return found


def _require_possible(count: int, by: str, fix: str) -> None:
    """Refuse more processes on this machine than it can use.

    Raises:
        UsageError: there are more.
    """
    most = _RANKS_A_PROCESSOR * processors()
    if count > most:
        can = f"this machine can use {most} at most ({processors()} processors)"
        raise UsageError(f"{by} asks for {count} processes; {can}", fix=fix)
