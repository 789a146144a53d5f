"""Ranks that train together, each a process of its own, to which something happens at a stated phase.

A plugin that is loaded into each rank writes down its process number, and holds rank 0 up at the phase until
what is to happen has happened.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

#: phase -> how rank 0 says it, or nothing for the one before the ranks have met
PHASES = {
    "start": "",
    "step": "step 5",
    "save": "saving step 4",
    "evaluation": "validation after step 6",
    "end": "the end",
}
TRAIN = shlex.split("""
    train --iters 10 --save-every 4 --batch-size 4 --steps-per-eval 6 --steps-per-report 2
    --learning-rate 1e-2 --lora-layers 1 --set adapter.rank=2""")
END_SECONDS = 30.0  # within which every rank has to end after one is lost
_FIRST_SECONDS = 120.0  # within which a phase has to be reached, on a machine that is busy

PLUGIN = """
import os, time
from pathlib import Path
from mlxlora_core.api import hookimpl
from mlxlora_core.distributed import watch

@hookimpl
def mlxlora_observers():
    return []

folder, phase, target = Path(os.environ["TRIAL"]), os.environ["TRIAL_PHASE"], os.environ["TRIAL_RANK"]
rank = os.environ.get("MLX_RANK", "0")
(folder / f"pid-{rank}").write_text(str(os.getpid()))

def hold():
    (folder / "reached").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)

if not phase and rank == target:
    hold()

before = watch._Watching.phase

def told(self, words):
    before(self, words)
    if phase and rank == "0" and words == phase and not (folder / "reached").exists():
        hold()

watch._Watching.phase = told
"""


@dataclass
class Ranks:
    """The processes of one trial.

    Attributes:
        folder: that they train in.
        processes: by rank.
        lost: the rank that something has happened to, or None.
        ended: rank -> seconds from then until it ended.
    """

    folder: Path
    processes: list[subprocess.Popen[bytes]]
    lost: int | None = None
    ended: dict[int, float] = field(default_factory=dict)

    def wait_for(self, name: str) -> None:
        """Wait until a rank has written a file of this name."""
        deadline = time.monotonic() + _FIRST_SECONDS
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"no rank came to it: {self.said()}"
            assert all(p.poll() is None for p in self.processes), f"one ended before: {self.said()}"
            time.sleep(0.01)

    def pid(self, rank: int) -> int:
        """The process number of a rank, below whatever has started it."""
        self.wait_for(f"pid-{rank}")
        return int((self.folder / f"pid-{rank}").read_text() or self.processes[rank].pid)

    def follow(self, waits_for: Sequence[int]) -> None:
        """Wait until ranks have ended, and note when each did."""
        began = time.monotonic()
        while len(self.ended) < len(waits_for) and time.monotonic() < began + END_SECONDS + 15:
            for rank in waits_for:
                if rank not in self.ended and self.processes[rank].poll() is not None:
                    self.ended[rank] = time.monotonic() - began
            time.sleep(0.01)

    def said(self, rank: int | None = None) -> list[str]:
        """The lines of mlxlora that a rank has written, or all of them; MLX may have begun one."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        texts = [(self.folder / f"err-{r}").read_text("utf-8", "replace") for r in ranks]
        return re.findall(r"mlxlora: .*", "\n".join(texts))


def train(model: Path, data: Path, folder: Path, *more: object) -> list[str]:
    """The command that trains in ``folder``."""
    outputs = ("--adapter-file", folder / "a.safetensors")
    program = [sys.executable, "-m", "mlxlora_core", *TRAIN]
    return [*program, *map(str, ("--model", model, "--data", data, *outputs, *more))]


def variables(folder: Path, phase: str = "none", rank: int = 0) -> dict[str, str]:
    """Those of a process whose plugin holds it up at a phase."""
    trial = {"TRIAL": str(folder), "TRIAL_PHASE": PHASES.get(phase, phase), "TRIAL_RANK": str(rank)}
    return {**os.environ, "MLXLORA_PLUGINS": "", **trial}


@contextmanager
def started(
    command: Sequence[str], count: int, folder: Path, environ: dict[str, str], network: Network | None = None
) -> Iterator[Ranks]:
    """So many ranks of a command, none of which is left afterwards."""
    folder.mkdir(exist_ok=True)
    (folder / "plugin.py").write_text(PLUGIN)
    hosts = [[f"{network.address(rank) if network else '127.0.0.1'}"] for rank in range(count)]
    port = free_ports(count + 1)
    ring = [[f"{host}:{port + rank}" for host in addresses] for rank, addresses in enumerate(hosts)]
    (folder / "hosts.json").write_text(json.dumps(ring))
    processes = []
    for rank in range(count):
        inside = network.inside(rank) if network else []
        place = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")}
        with open(folder / f"err-{rank}", "wb") as err:
            whole = [*inside, *command, "-P", str(folder / "plugin.py")]
            processes.append(
                subprocess.Popen(whole, env={**environ, **place}, stdout=subprocess.DEVNULL, stderr=err)
            )
    try:
        yield Ranks(folder, processes)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free on the loopback address."""
    while True:
        first = random.randrange(12_000, 20_000 - count)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()


class Network:
    """A machine for each rank, as far as networks go: namespaces on one bridge. It takes the superuser."""

    def __init__(self, count: int) -> None:
        self._count, self._name = count, f"mr{os.getpid() % 100_000}"

    def __enter__(self) -> Network:
        bridge = f"{self._name}b"
        _ip(f"netns add {bridge}")
        _ip(f"-n {bridge} link add br0 type bridge")
        _ip(f"-n {bridge} link set br0 up")
        for rank in range(self._count):
            space = self.space(rank)
            _ip(f"netns add {space}")
            _ip(f"-n {space} link set lo up")
            _ip(f"-n {bridge} link add v{rank} type veth peer name eth0 netns {space}")
            _ip(f"-n {bridge} link set v{rank} master br0 up")
            _ip(f"-n {space} addr add {self.address(rank)}/24 dev eth0")
            _ip(f"-n {space} link set eth0 up")
        return self

    def __exit__(self, *fault: object) -> None:
        for name in (f"{self._name}b", *(self.space(rank) for rank in range(self._count))):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def space(self, rank: int) -> str:
        """The name of a rank's namespace."""
        return f"{self._name}r{rank}"

    def address(self, rank: int) -> str:
        """The address of a rank."""
        return f"10.77.0.{rank + 1}"

    def inside(self, rank: int) -> list[str]:
        """What a command begins with that is to run in a rank's namespace."""
        return ["ip", "netns", "exec", self.space(rank)]

    def cut(self, rank: int) -> None:
        """Let nothing come to a rank or go from it any more."""
        _ip(f"-n {self._name}b link set v{rank} down")


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


def can_have_networks() -> str:
    """Nothing, or why there are no network namespaces here."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces take the superuser"
    try:
        with Network(1):
            return ""
    except (OSError, subprocess.CalledProcessError) as fault:
        return f"there are no network namespaces here: {fault}"


def happen(what: str, ranks: Ranks, rank: int, network: Network | None) -> None:
    """Do to a rank what a trial is about."""
    ranks.lost = rank
    signals: dict[str, Callable[[], None]] = {
        "kill": lambda: os.kill(ranks.pid(rank), signal.SIGKILL),
        "stop": lambda: os.kill(ranks.pid(rank), signal.SIGSTOP),
        "cut": lambda: network.cut(rank) if network else None,
    }
    signals[what]()
