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
    if ranks is None:
        return read_hosts(hosts) if hosts is not None else None
    most = _RANKS_A_PROCESSOR * processors()
    if ranks > most:
        raise UsageError(
            f"-n asks for {ranks} processes; this machine can use {most} at most ({processors()} processors)",
            fix="ask for fewer; the option for how many tokens to generate is --num-tokens",
        )
    return here(ranks)
