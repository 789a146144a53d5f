"""Deals rows out by length to ranks, or to the cores of one, so that all of them finish together."""

from __future__ import annotations

from collections.abc import Sequence


def deal(rows: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """The rows of each part, in the order that they have in ``rows``; a function of the arguments alone.

    The longest comes first, and each goes to the part with the fewest tokens so far. No part gets more
    than one row above its share, for a batch is as large as the share, and where there are fewer rows
    than parts some get none.

    Args:
        rows: of a step, each once.
        lengths: in tokens, of each of them.
        parts: how many there are: ranks, or cores of one.
    """
    most = -(-len(rows) // parts)
    dealt: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for place in sorted(range(len(rows)), key=lambda place: -lengths[place]):
        part = min((p for p in range(parts) if len(dealt[p]) < most), key=lambda p: (tokens[p], p))
        dealt[part].append(place)
        tokens[part] += lengths[place]
    return [[rows[place] for place in sorted(places)] for places in dealt]
