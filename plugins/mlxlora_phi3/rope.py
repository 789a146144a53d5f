"""By which angles rotary positions turn, in texts up to the original length and in longer ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from mlxlora_phi3.config import ModelArgs

#: the base of the frequencies, or the angle a position of each pair of features
Turning: TypeAlias = float | tuple[float, ...]


@dataclass(frozen=True)
class Turnings:
    """The two ways in which positions turn; a text turns in one of them, whole.

    Source: Ding et al. 2024, arXiv:2402.13753 (LongRoPE).

    Attributes:
        short: in a text of up to ``original`` tokens.
        long: in a longer one.
        original: tokens; None where there is no other way.
    """

    short: Turning
    long: Turning
    original: int | None

    def is_long(self, tokens: int) -> bool:
        """Whether a text of so many tokens turns as a long one does."""
        return self.original is not None and tokens > self.original


def turnings(args: ModelArgs) -> Turnings:
    """How the positions of a model turn."""
    if args.rope_original_len is None:
        return Turnings(args.rope_theta, args.rope_theta, None)
    plain = [args.rope_theta ** (-2 * pair / args.turned) for pair in range(args.turned // 2)]
    short, long = (
        tuple(angle / by for angle, by in zip(plain, divisors or (), strict=True))
        for divisors in (args.rope_short_divisors, args.rope_long_divisors)
    )
    return Turnings(short, long, args.rope_original_len)


def attention_factor(growth: float, original: int) -> float:
    """What turned queries and keys are multiplied by where nobody says otherwise.

    Source: Ding et al. 2024, arXiv:2402.13753, and the modelling code of Phi-3.

    Args:
        growth: how many times the longest text is as long as the original one.
        original: length of that, tokens.
    """
    return math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 and original > 1 else 1.0
