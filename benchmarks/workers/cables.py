"""Network namespaces joined by cables of any length and rate, on one machine with Linux, as root.

Each namespace has one interface, ``cable``, with an address of its own. ``tc`` limits its rate (token
bucket, ``tbf``). The delay is that of a switch in this process: a packet leaves it a stated time after
it came. A kernel with ``netem`` would do as well, but not every kernel has it.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_CSUM, _TSO4 = 1, 2
_HEADER = 10  # bytes before a packet that say how it is cut into segments
_DESTINATION = _HEADER + 16  # of an address of IPv4
_LARGEST = 1 << 17
_LARGE_PACKET = 70_000  # with headers
#: what may wait for a cable: more than any message here has, so that nothing is lost
_WAITING_BYTES = 64 << 20


def namespace(rank: int) -> str:
    """The name of the namespace of a rank."""
    return f"mlxlora-{rank}"


def address(rank: int) -> str:
    """The address of a rank."""
    return f"10.77.0.{rank + 1}"


def is_cut(bits_per_second: float) -> bool:
    """Whether ``tc`` cuts the large packets that the kernel makes into those of the cable; it costs time."""
    return bits_per_second < 3e8


def headers(bits_per_second: float) -> float:
    """Bytes that count for the rate with each segment, acknowledgements too; a large packet has them once."""
    return 78 if is_cut(bits_per_second) else 78 * 1448 / (1 << 16)


class Switch:
    """What joins the cables; :func:`joined` makes one.

    Attributes:
        delay: seconds from when a packet comes until it goes on.
    """

    def __init__(self, cables: Sequence[int]) -> None:
        self.delay = 0.0
        self._cables, self._ended = cables, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def set_rate(self, bits_per_second: float) -> None:
        """Let each cable carry so much, in each direction."""
        burst = 4096 if is_cut(bits_per_second) else _LARGE_PACKET
        for rank in range(len(self._cables)):
            limit = ("rate", f"{bits_per_second:.0f}bit", "burst", str(burst), "limit", str(_WAITING_BYTES))
            _ip(
                "netns",
                "exec",
                namespace(rank),
                "tc",
                "qdisc",
                "replace",
                "dev",
                "cable",
                "root",
                "tbf",
                *limit,
            )

    def close(self) -> None:
        """Stop."""
        self._ended = True
        self._thread.join()

    def _run(self) -> None:
        # Before what else the machine does: a packet is late otherwise.
        with suppress(PermissionError):
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_RR, os.sched_param(20))
        waiting: deque[tuple[float, int, bytes]] = deque()
        while not self._ended:
            wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
            for cable in select.select(self._cables, (), (), wait)[0]:
                packet = os.read(cable, _LARGEST)
                to = packet[_DESTINATION + 3] - 1
                if packet[_HEADER] >> 4 == 4 and 0 <= to < len(self._cables):  # and not of IPv6
                    waiting.append((time.monotonic() + self.delay, self._cables[to], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, cable, packet = waiting.popleft()
                os.write(cable, packet)


@contextmanager
def joined(ranks: int) -> Iterator[Switch]:
    """Namespaces for so many ranks, and the switch between them; all is gone afterwards."""
    cables: list[int] = []
    made = 0
    try:
        for rank in range(ranks):
            _ip("netns", "add", namespace(rank))
            made += 1
            cables.append(_cable(rank))
        switch = Switch(cables)
        try:
            yield switch
        finally:
            switch.close()
    finally:
        for cable in cables:
            os.close(cable)
        for rank in range(made):
            _ip("netns", "del", namespace(rank))


def _cable(rank: int) -> int:
    """The end at the switch of the cable of a rank."""
    name, there = f"mlxlora{rank}", namespace(rank)
    cable = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(
        cable, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
    )
    fcntl.ioctl(cable, _TUNSETOFFLOAD, _CSUM | _TSO4)  # large packets, as a network card takes them
    _ip("link", "set", name, "netns", there, "name", "cable")
    for command in (
        ("ip", "link", "set", "lo", "up"),
        ("ip", "link", "set", "cable", "txqueuelen", "10000", "up"),
        ("ip", "addr", "add", f"{address(rank)}/24", "dev", "cable"),
        # The control of congestion that most systems have.
        ("ip", "route", "replace", "10.77.0.0/24", "dev", "cable", "congctl", "cubic"),
    ):
        _ip("netns", "exec", there, *command)
    return cable


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
