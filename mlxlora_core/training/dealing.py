"""Rows, dealt out by length to ranks, or to the cores of one, so that all of them finish together."""

from __future__ import annotations

from collections.abc import Sequence


def deal(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The rows of each rank, in the order that they have in ``rows``; a function of the arguments alone.

    The longest comes first, and each goes to the rank with the fewest tokens so far. No rank gets more
    than one row above its share, for a batch is as large as the share, and where there are fewer rows
    than ranks some get none.

    Args:
        rows: of a step, each once.
        lengths: in tokens, of each of them.
        ranks: how many there are.
    """
    most = -(-len(rows) // ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for place in sorted(range(len(rows)), key=lambda place: -lengths[place]):
        rank = min((r for r in range(ranks) if len(dealt[r]) < most), key=lambda r: (tokens[r], r))
        dealt[rank].append(place)
        tokens[rank] += lengths[place]
    return [[rows[place] for place in sorted(places)] for places in dealt]
