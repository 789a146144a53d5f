"""The group of processes that train together, and what goes round between them.

Each is a *rank*, counted from 0. All of them call the same functions here in the same order; one that
does not come is waited for. MLX is imported only where something goes round.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.distributed.environment import is_rank
from mlxlora_core.distributed.starting import joining
from mlxlora_core.machine.memory import shared_by

if TYPE_CHECKING:
    import mlx.core as mx

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Group:
    """The ranks that there are, seen from one of them.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0

    def sum(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """The sums of arrays over all ranks, as float32, in one message that may be still to come.

        Args:
            arrays: of the same shapes on each rank, not all of them empty.
        """
        import mlx.core as mx

        alone = [x.astype(mx.float32) for x in arrays]
        if self.size == 1:
            return alone
        ends = list(accumulate(x.size for x in alone))
        parts = [*(x.reshape(-1) for x in alone), mx.zeros(spare_numbers(ends[-1], self.size))]
        *summed, _ = mx.split(mx.distributed.all_sum(mx.concatenate(parts)), ends)
        return [part.reshape(x.shape) for part, x in zip(summed, alone, strict=True)]

    def share(self, value: bytes) -> list[bytes]:
        """What each rank gives here, in the order of ranks; two messages."""
        if self.size == 1:
            return [value]
        import mlx.core as mx
        import numpy as np

        lengths = _numbers(mx.distributed.all_gather(mx.array([len(value)], mx.uint32)))
        most = max(int(lengths.max()), 1)
        padded = np.frombuffer(value.ljust(most, b"\0"), np.uint8)
        gathered = _numbers(mx.distributed.all_gather(mx.array(padded))).reshape(self.size, most)
        return [row[:length].tobytes() for row, length in zip(gathered, lengths.tolist(), strict=True)]

    def broadcast(self, value: bytes = b"") -> bytes:
        """What rank 0 gives here, on every rank; two messages, each as long as that."""
        if self.size == 1:
            return value
        import mlx.core as mx
        import numpy as np

        given = value if self.leads else b""
        length = int(_numbers(mx.distributed.all_sum(mx.array([len(given)], mx.uint32)))[0])
        # Words of integers, whose sum with zeros is exact.
        words = np.frombuffer(given.ljust(-(-max(length, 1) // 4) * 4, b"\0"), np.uint32)
        return bytes(_numbers(mx.distributed.all_sum(mx.array(words))).tobytes()[:length])

    def wait(self) -> None:
        """Wait until each rank is here."""
        if self.size == 1:
            return
        import mlx.core as mx

        mx.eval(self.sum([mx.zeros(1)]))

    @cached_property
    def _places(self) -> tuple[tuple[str, int], ...]:
        """What tells the machine of each rank from others, and the number of its process there."""
        boot = _BOOT.read_text("ascii").strip() if _BOOT.is_file() else ""
        mine = json.dumps([f"{platform.node()} {boot}", os.getpid()])
        return tuple((name, process) for name, process in map(json.loads, self.share(mine.encode())))

    @property
    def machines(self) -> tuple[str, ...]:
        """What tells the machine of each rank from others; the first that ask do so on every rank."""
        return tuple(name for name, _ in self._places)

    @contextmanager
    def sharing_memory(self) -> Iterator[None]:
        """Inside, memory that is asked for is to be there for each rank of this machine, as all need it.

        The first that come here do so on every rank.
        """
        here, _ = self._places[self.rank]
        with shared_by([process for machine, process in self._places if machine == here]):
            yield

    def sharing_processors(self) -> int:
        """How many ranks compute on processors of this one, itself among them."""
        mine = _processors()
        everybody = [set(map(int, part.split())) for part in self.share(" ".join(map(str, mine)).encode())]
        here = zip(self.machines, everybody, strict=True)
        return sum(name == self.machines[self.rank] and bool(mine & theirs) for name, theirs in here)

    @contextmanager
    def first_of_machine(self) -> Iterator[None]:
        """Let the first rank of each machine go through this block, and then its others.

        What it reads from a disk or fetches is at hand for them then. It asks for memory for all of them.
        """
        waits = self.machines[self.rank] in self.machines[: self.rank]
        if waits:
            self.wait()
        with self.sharing_memory():
            yield
        if not waits:
            self.wait()


def _numbers(message: mx.array) -> Any:
    """A message as an array of numpy, once it is whole.

    Numpy asks MLX for the memory of an array, and gets it with anything at all in it where the message
    failed; :func:`mx.eval` raises then.
    """
    import mlx.core as mx
    import numpy as np

    mx.eval(message)
    return np.array(message)


def _processors() -> set[int]:
    """Numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def spare_numbers(numbers: int, ranks: int) -> int:
    """How many zeros a message ends with, so that MLX's ring cuts it into equal parts.

    It halves it for two directions, each half into a segment for each rank, and each segment into two
    packets. Of an odd segment one number is left, which is a packet of its own and waits as long as the
    others do: between four ranks 20 ms apart a message then took 183 ms instead of 122.
    """
    return -numbers % (4 * ranks)


#: a process by itself
ALONE = Group(0, 1)


@cache
def join() -> Group:
    """The group that this process was started in, joined once; :data:`ALONE` where it was started by itself.

    :func:`~mlxlora_core.distributed.watch.watching` is to follow at once.

    Raises:
        RankError: another rank has not come in time, or MLX cannot join them.
        UsageError: the environment contradicts itself, or the port to meet at is taken.
    """
    if not is_rank():
        return ALONE
    import mlx.core as mx

    with joining():
        group = mx.distributed.init(strict=True)
    return Group(group.rank(), group.size())
