"""The machines that a training is spread over: a file as ``mlx.launch --hostfile`` reads it, or this one."""

from __future__ import annotations

import ipaddress
import random
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxlora_core.errors import UsageError
from mlxlora_core.files.documents import read_json

PORT = 32323  # the first that a ring takes between machines, as by mlx.launch
_FIRST_LOCAL_PORT, _LAST_LOCAL_PORT = 20_000, 32_000  # below those that systems give out by themselves
_MOST_BYTES = 1 << 20
_LOOPBACK = "127.0.0.1"
_VARIABLE = re.compile(r"[A-Za-z_]\w*=[^\0\ud800-\udfff]*", re.ASCII).fullmatch
_NAME = re.compile(r"[^-\s\0\ud800-\udfff][^\s\0\ud800-\udfff]*").fullmatch  # that ssh takes for no option
_EXAMPLE = 'such as [{"ssh": "mac1.local", "ips": ["10.0.0.1"]}, {"ssh": "mac2.local", "ips": ["10.0.0.2"]}]'


@dataclass(frozen=True)
class Host:
    """Where one rank runs.

    Attributes:
        name: what ssh calls the machine.
        addresses: of it, which the other ranks reach it by; a connection of the ring for each.
    """

    name: str
    addresses: tuple[str, ...]

    @property
    def is_here(self) -> bool:
        """Whether it is this machine: by its name, or as one of its addresses is."""
        own = socket.gethostname()
        if self.name in (_LOOPBACK, "localhost", "::1", own, own.partition(".")[0]):
            return True
        return any(not ipaddress.ip_address(a).is_loopback and _is_own(a) for a in self.addresses)


@dataclass(frozen=True)
class Hosts:
    """Where each rank runs, and which variables it gets there."""

    ranks: Sequence[Host]
    environment: Mapping[str, str] = field(default_factory=dict)

    def ring(self) -> list[list[str]]:
        """``host:port`` of each connection of each rank; the port after them is free too, as far as is known.

        Raises:
            UsageError: there are not enough free ports.
        """
        counts = [len(host.addresses) for host in self.ranks]
        local = all(host.is_here for host in self.ranks)
        port = _free_ports(sum(counts) + 1) if local else PORT
        found = []
        for host in self.ranks:
            found.append([f"{address}:{port + i}" for i, address in enumerate(host.addresses)])
            port += len(host.addresses)
        return found


def here(count: int) -> Hosts:
    """So many ranks on this machine."""
    return Hosts([Host(_LOOPBACK, (_LOOPBACK,))] * count)


def read_hosts(path: Path) -> Hosts:
    """The machines in a file.

    Raises:
        UsageError: it cannot be read, holds no list of machines, or asks for what is not a ring.
    """
    found = read_json(path, _MOST_BYTES, UsageError)
    whole: dict[str, Any] = found if isinstance(found, dict) else {"hosts": found}
    backend = whole.get("backend") or "ring"
    if backend != "ring":
        start = f"mlx.launch --hostfile {path} --backend {backend} -- mlxlora ..."
        raise UsageError(f"asks for {backend}, and --hosts starts rings", where=path, fix=f"start {start}")
    hosts, envs = whole.get("hosts"), whole.get("envs", [])
    if not isinstance(hosts, list) or not hosts:
        raise UsageError("holds no list of machines", where=path, fix=_EXAMPLE)
    if not (isinstance(envs, list) and all(isinstance(each, str) and _VARIABLE(each) for each in envs)):
        raise UsageError("envs is no list of texts NAME=VALUE", where=path)
    ranks = [_host(host, f"{path}: machine {number}") for number, host in enumerate(hosts, 1)]
    for number, host in enumerate(ranks[1:], 2):
        if len(host.addresses) != len(ranks[0].addresses):
            what = f"has {len(host.addresses)} in ips, and machine 1 has {len(ranks[0].addresses)}"
            fix = "name as many for each: each is a connection of the ring"
            raise UsageError(what, where=f"{path}: machine {number}", fix=fix)
    if not ranks[0].is_here:
        fix = 'put this machine first, whose files rank 0 writes; "localhost" is a name for it'
        raise UsageError(f"the first machine is {ranks[0].name}, and not this one", where=path, fix=fix)
    return Hosts(ranks, dict(each.split("=", 1) for each in envs))


def _host(value: Any, where: str) -> Host:
    """One machine of a file, which may name it by an address alone."""
    name = value.get("ssh") if isinstance(value, dict) else None
    if not isinstance(name, str) or not _NAME(name):
        raise UsageError("has no name for ssh", where=where, fix=_EXAMPLE)
    addresses = value.get("ips") or [name]
    if not isinstance(addresses, list) or not all(map(_is_address, addresses)):
        what = "ips is no list of IPv4 addresses, such as the ring of MLX takes"
        raise UsageError(what, where=where, fix=_EXAMPLE)
    return Host(name, tuple(addresses))


def _is_address(text: Any) -> bool:
    try:
        return isinstance(text, str) and bool(ipaddress.IPv4Address(text))
    except ValueError:
        return False


def _is_own(address: str) -> bool:
    """Whether an address is one of this machine, which alone can listen there."""
    try:
        with socket.socket() as probe:
            probe.bind((address, 0))
            return True
    except OSError:
        return False


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for _ in range(100):
        first = random.randint(_FIRST_LOCAL_PORT, _LAST_LOCAL_PORT - count)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind((_LOOPBACK, port))
            except OSError:
                continue
        return first
    raise UsageError(f"there are no {count} free ports in a row", fix="end what listens on them")
