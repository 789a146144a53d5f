"""How long a sum over ranks takes on MLX's ring: a model of its messages and of TCP, in seconds.

The message is cut into a segment for each rank. In 2 · (ranks - 1) rounds every rank sends a segment to
its neighbour and gets one from the other: at first they add up, then the sums go round. A segment goes
in packets, of which two are under way at a time, and what is sent in a round must have come in the one
before. So a round takes the delay of the network and the time that a segment takes on the wire.

After some time in which nothing was said, TCP begins anew with ten segments of its own a round trip, and
doubles that with each (RFC 5681, section 4.1): a message then waits for acknowledgements too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

#: of MLX's ring: numbers of a packet at least and at most, and bytes from which on both directions are used
_FEWEST, _MOST, _ONE_WAY_BYTES = 32768, 2 << 20, 262144
#: of TCP on Ethernet: bytes of a segment, and segments that are sent at first
_SEGMENT, _FIRST = 1448, 10


@dataclass(frozen=True)
class Network:
    """What joins two machines.

    Attributes:
        name: in words.
        delay: seconds from one machine to the next, one way.
        rate: bits a second that a machine can send, and at the same time receive.
        headers: bytes on the wire with each segment of TCP: of Ethernet (38), IP and TCP (52), and half an
            acknowledgement (84) of what comes the other way.
    """

    name: str
    delay: float
    rate: float
    headers: float = 132


@dataclass(frozen=True)
class Overhead:
    """What machines take themselves.

    Attributes:
        packet: seconds to hand a packet over, on both sides.
        byte: seconds to copy a byte, and to add its number.
    """

    packet: float
    byte: float


def packets_of(numbers: int, ranks: int) -> tuple[list[int], int]:
    """The bytes of the packets that one segment goes in, and in how many directions messages go round."""
    directions = max(min(2, 4 * numbers // (ranks * _ONE_WAY_BYTES)), 1)
    segment = math.ceil(math.ceil(numbers / directions) / ranks)
    packet = max(_FEWEST, min(_MOST, segment // 2))
    return [4 * min(packet, segment - start) for start in range(0, segment, packet)], directions


def message_seconds(
    numbers: int, ranks: int, network: Network, overhead: Overhead, after_idle: bool = True
) -> float:
    """The time from when the last rank begins until all have the sum.

    Args:
        numbers: float32 numbers of the message.
        ranks: two or more, each with a machine of its own.
        network: between each two.
        overhead: of the machines.
        after_idle: whether nothing was said for some seconds before, as while a step is computed.
    """
    one, directions = packets_of(numbers, ranks)
    packets = one * (2 * (ranks - 1))
    byte = 8 * directions / network.rate * (1 + network.headers / _SEGMENT)  # directions share the wire
    arrived: list[float] = []
    acknowledged: list[float] = []  # for each segment of TCP, when its sender knows that it has come
    free = 0.0  # the wire
    for i, size in enumerate(packets):
        ahead = 2 if len(one) > 1 else 1
        posted = arrived[i - ahead] if i >= ahead else 0.0
        for sent in _segments(size):
            k = len(acknowledged)
            # With a window of 10, and 1 more for each that is acknowledged, k are sent when (k - 10) / 2 are.
            waits = after_idle and k >= _FIRST
            start = max(posted, free, acknowledged[(k - _FIRST) // 2] if waits else 0.0)
            free = start + sent * byte
            acknowledged.append(free + 2 * network.delay)
        arrived.append(free + network.delay + overhead.packet + size * overhead.byte * directions)
    return max(arrived)


def _segments(size: int) -> list[int]:
    """The bytes of the segments of TCP that a packet goes in."""
    ends = [*range(_SEGMENT, size, _SEGMENT), size]
    return [end - start for start, end in zip(accumulate([0, *ends[:-1]], max), ends, strict=True)]
