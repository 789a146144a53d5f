"""Deals rows out by length to ranks, or to the cores of one, so that all of them finish together."""

from __future__ import annotations

from collections.abc import Sequence


def deal(rows: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """The rows of each part, in their order in ``rows``; a function of the arguments alone.

    The longest row is dealt first, and each goes to the part with the fewest tokens so far. No part
    gets more than its share of the rows, rounded up; with fewer rows than parts, some get none.

    Args:
        rows: of a step, each once.
        lengths: of each row, in tokens.
        parts: the number of ranks, or of cores.
    """
    most = -(-len(rows) // parts)
    dealt: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for place in sorted(range(len(rows)), key=lambda place: -lengths[place]):
        part = min((p for p in range(parts) if len(dealt[p]) < most), key=lambda p: (tokens[p], p))
        dealt[part].append(place)
        tokens[part] += lengths[place]
    return [[rows[place] for place in sorted(places)] for places in dealt]
