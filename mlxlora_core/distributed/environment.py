"""Which rank this process is, of how many, and what started it: read off environment variables alone.

MLX's own are those of ``mlx.launch`` and of ``mlxlora train -n``: ``MLX_RANK``, with
``MLX_HOSTFILE`` for the ring, ``MLX_WORLD_SIZE`` for NCCL, ``MLX_IBV_DEVICES`` for JACCL. MPI has its
own, by the name of who starts it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.errors import UsageError, short

RANK = "MLX_RANK"
HOSTFILE, WORLD_SIZE, DEVICES = "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_IBV_DEVICES"
COORDINATOR, NCCL_HOST, NCCL_PORT = "MLX_JACCL_COORDINATOR", "NCCL_HOST_IP", "NCCL_PORT"
#: the process that has started the ranks of this machine, where that is mlxlora
LAUNCHER = "MLXLORA_LAUNCHER"

#: variables of MPI that say rank and size: Open MPI's, and those of PMI, which Slurm has too
_MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
_FIX = "start the ranks with --hosts or -n, mlx.launch or mpirun"


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet before MLX lets them join.

    Attributes:
        hosts: addresses of rank 0, the likeliest first.
        port: that it listens on; no port that MLX takes.
        proof: by which ranks of one group know each other.
    """

    hosts: tuple[str, ...]
    port: int
    proof: str


def is_rank() -> bool:
    """Whether this process is one of several that were started together.

    Raises:
        UsageError: the environment contradicts itself.
    """
    return size() > 1


def rank() -> int:
    """The number of this process among :func:`size`; 0 where it was started alone.

    Raises:
        UsageError: as :func:`is_rank`.
    """
    return _place()[0]


def size() -> int:
    """How many processes were started together; 1 where there is no other.

    Raises:
        UsageError: as :func:`is_rank`.
    """
    return _place()[1]


def meeting() -> Meeting | None:
    """Where the ranks meet: at an address of rank 0, on the port after those that MLX takes.

    None where this process is alone, and with MPI, which has ways of its own to find the others.

    Raises:
        UsageError: as :func:`is_rank`.
    """
    if not is_rank() or _started_by_mpi():
        return None
    if HOSTFILE in os.environ:
        ring = _hosts()
        addresses = [address for rank in ring for address in rank]
        host, port = _address(ring[0][0])
        return Meeting((host,), 1 + max(_address(each)[1] for each in addresses), _proof(json.dumps(ring)))
    if DEVICES in os.environ:
        host, port = _address(os.environ.get(COORDINATOR, ""))
    else:
        host, port = os.environ.get(NCCL_HOST, ""), _number(NCCL_PORT)
    return Meeting((host,), port + 1, _proof(f"{host}:{port}:{size()}"))


def launcher() -> int:
    """The number of the process that has started this rank, where that is mlxlora; else 0."""
    return int(os.environ.get(LAUNCHER) or 0) if is_rank() else 0


def _place() -> tuple[int, int]:
    """Rank and size."""
    if RANK not in os.environ:
        for name, count in _MPI:
            if name in os.environ and count in os.environ:
                return _checked(name, _number(name), _number(count))
        return 0, 1
    if HOSTFILE in os.environ:
        return _checked(RANK, _number(RANK), max(len(_hosts()), 1))
    if WORLD_SIZE in os.environ:
        return _checked(RANK, _number(RANK), _number(WORLD_SIZE))
    if DEVICES in os.environ:
        return _checked(RANK, _number(RANK), len(_listed(DEVICES)))
    return 0, 1  # of which MLX makes nothing either


def _started_by_mpi() -> bool:
    return RANK not in os.environ


def _checked(name: str, rank: int, size: int) -> tuple[int, int]:
    if not 0 <= rank < size:
        raise UsageError(f"{name} is {rank}, and there are {size} ranks, counted from 0", fix=_FIX)
    return rank, size


def _hosts() -> list[list[str]]:
    """The addresses of each rank of a ring: none where mlx.launch starts a single one."""
    hosts = _listed(HOSTFILE)
    if not all(isinstance(rank, list) and rank and all(isinstance(a, str) for a in rank) for rank in hosts):
        raise UsageError("holds no list of addresses for each rank", where=_named(HOSTFILE), fix=_FIX)
    return hosts


def _listed(name: str) -> list[Any]:
    """The list in the JSON file that a variable names."""
    try:
        text = Path(os.environ[name]).read_text("utf-8")
        found = json.loads(text) if text.strip() else []
    except (OSError, ValueError) as fault:
        raise UsageError(f"cannot be read: {fault}", where=_named(name), fix=_FIX) from fault
    if not isinstance(found, list):
        raise UsageError("holds no list", where=_named(name), fix=_FIX)
    return found


def _address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 address may stand in brackets."""
    host, _, port = text.rpartition(":")
    if not (host and port.isdecimal()):
        raise UsageError(f"{short(text, 60)!r} is no address of a rank, such as 10.0.0.1:32323", fix=_FIX)
    return host.strip("[]"), int(port)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UsageError(f"{name} is {short(text, 60)!r}, and a whole number is wanted", fix=_FIX)
    return int(text)


def _named(name: str) -> str:
    return f"{name}={os.environ[name]}"


def _proof(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
