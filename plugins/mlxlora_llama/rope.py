"""By which angles rotary positions turn: the frequencies of each scaling, in plain floats."""

from __future__ import annotations

import math

from mlxlora_llama.config import ModelArgs


def turning(args: ModelArgs) -> float | tuple[float, ...]:
    """The base of the frequencies, or where they are scaled the angle a position of each pair of features."""
    if args.rope_scaling is None:
        return args.rope_theta
    width = args.head_dim
    plain = [args.rope_theta ** (-2 * pair / width) for pair in range(width // 2)]
    if args.rope_scaling == "linear":
        return tuple(angle / _number(args.rope_factor) for angle in plain)
    if args.rope_scaling == "llama3":
        return tuple(_llama3(angle, args) for angle in plain)
    if args.rope_scaling == "yarn":
        return _yarn(plain, args)
    return tuple(angle / by for angle, by in zip(plain, args.rope_divisors or (), strict=True))


def yarn_attention(factor: float) -> float:
    """What YaRN multiplies queries and keys by where nobody says otherwise.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.4.
    """
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _llama3(angle: float, args: ModelArgs) -> float:
    """A frequency of Llama 3.1: divided where it turns seldom in the original length, kept where often."""
    low, high = _number(args.rope_low_freq_factor), _number(args.rope_high_freq_factor)
    factor = _number(args.rope_factor)
    turns = _number(args.rope_original_len) * angle / (2 * math.pi)
    share = min(max((turns - low) / (high - low), 0.0), 1.0)
    return angle * ((1 - share) / factor + share)


def _yarn(plain: list[float], args: ModelArgs) -> tuple[float, ...]:
    """The frequencies of YaRN: those of the first pairs as they are, of the last ones divided.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2.
    """
    width, factor = args.head_dim, _number(args.rope_factor)
    first, last = (
        width
        * math.log(_number(args.rope_original_len) / (turns * 2 * math.pi))
        / (2 * math.log(args.rope_theta))
        for turns in (_number(args.rope_beta_fast), _number(args.rope_beta_slow))
    )
    if args.rope_truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = last - first if last != first else 1e-3
    divided = [min(max((pair - first) / span, 0.0), 1.0) for pair in range(len(plain))]
    return tuple(angle * (1 - share + share / factor) for angle, share in zip(plain, divided, strict=True))


def _number(value: float | None) -> float:
    """A number that the arguments have found to be there."""
    assert value is not None
    return value
