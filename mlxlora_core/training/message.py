"""The one message that ranks exchange in a step: gradients, nats, counts and signals.

Numbers are sent as float32, which is exact for whole numbers up to 2**24. Counts that may be larger are
sent as two halves, whose sums over any number of ranks are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.distributed.group import Group
from mlxlora_core.errors import RankError, listing
from mlxlora_core.training.gradient import Sums
from mlxlora_core.training.loss import Loss

_HALF = 2**12  # of a count below 2**36; sums over 2**12 ranks are exact
_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True)
class Total:
    """Sums over all ranks for a step; the device may still be computing its arrays.

    Attributes:
        total: nats.
        gradient: of the total, as a tree like the parameters that train.
        halves: of the counts of tokens, positions and padding, (3, 2).
        signals: the signal that each rank has received, 0 for none, (R,).
        checks: checksums of each rank's parameters before the step, in halves of 16 bits, (R, 2).
    """

    total: mx.array
    gradient: Any
    halves: mx.array
    signals: mx.array
    checks: mx.array

    @property
    def tokens(self) -> mx.array:
        """How many tokens counted, rounded to float32."""
        return self.halves[0, 0] + _HALF * self.halves[0, 1]

    @property
    def loss(self) -> Loss:
        """Nats and counts on the host, which waits for the device."""
        return Loss(float(self.total), *_whole(self.halves, _HALF))

    @property
    def signum(self) -> int | None:
        """The signal that ends the training, from the lowest rank that has received one; or None."""
        return next((int(signum) for signum in _numbers(self.signals) if signum), None)

    @property
    def checksums(self) -> list[int]:
        """The checksum of each rank's parameters, in order."""
        return _whole(self.checks, 2**16)


def _whole(halves: mx.array, base: int) -> list[int]:
    """The whole numbers that halves (N, 2) stand for."""
    return [int(low) + base * int(high) for low, high in _numbers(halves)]


def _numbers(message: mx.array) -> Any:
    """An array as numpy; evaluated first, since numpy would read garbage if the message failed."""
    mx.eval(message)
    return np.array(message)


def add_up(group: Group, sums: Sums, parameters: Any, signum: int | None) -> Total:
    """The sums over all ranks, in one message.

    Args:
        group: the ranks.
        sums: over the rows of this rank, which may have none.
        parameters: those that train, before the step.
        signum: a signal that this rank has received, or None.
    """
    without = sums.gradient is None
    named = dict(tree_flatten(parameters if without else sums.gradient))
    leaves = [mx.zeros_like(leaf) if without else leaf for leaf in named.values()]
    numbers = (sums.counts.tokens, sums.counts.positions, sums.counts.padding)
    mine, check = mx.arange(group.size) == group.rank, checksum(parameters)
    small = [
        mx.array(0.0) if without else sums.total,
        mx.array([[number % _HALF, number // _HALF] for number in numbers]),
        mine * (signum or 0),
        mine[:, None] * mx.stack([check & 0xFFFF, check >> 16]),
    ]
    total, halves, signals, checks, *summed = group.sum([*small, *leaves])
    own = zip(named.items(), summed, strict=True)
    tree = tree_unflatten([(name, leaf.astype(part.dtype)) for (name, part), leaf in own])
    return Total(total, tree, halves, signals, checks)


def checksum(parameters: Any) -> mx.array:
    """The sum, modulo 2**32, of all numbers of a tree read as unsigned integers, uint32."""
    leaves = dict(tree_flatten(parameters)).values()
    return mx.stack([leaf.view(_WORDS[leaf.dtype.size]).astype(mx.uint32).sum() for leaf in leaves]).sum()


def require_same(checksums: Sequence[int], step: int) -> None:
    """Refuse ranks whose parameters differ.

    Args:
        checksums: of the parameters of each rank, in order.
        step: the step that follows.

    Raises:
        RankError: it names the ranks that differ from the majority, or all if there is no majority.
    """
    if len(set(checksums)) == 1:
        return
    most, count = Counter(checksums).most_common(1)[0]
    odd = [rank for rank, total in enumerate(checksums) if total != most]
    who = f"rank {listing(odd)} has" if 2 * count > len(checksums) else "the ranks have"
    sums = listing(f"{rank}: {total:08x}" for rank, total in enumerate(checksums))
    raise RankError(
        f"{who} diverged: before step {step} the adapter has not the same bits everywhere ({sums}); the "
        "step was not saved",
        fix="go on with --resume; where it happens again, look for faulty memory or another version of MLX",
    )
