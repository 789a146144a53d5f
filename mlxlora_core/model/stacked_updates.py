"""Several low-rank updates of one linear: summed, or chosen for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from mlxlora_core.values import LowRank

#: (inputs of a linear, its outputs) -> the outputs with an update added
Update = Callable[[mx.array, mx.array], mx.array]


def mixed(updates: Sequence[tuple[float, LowRank]]) -> Update:
    """The sum of low-rank updates, each times its share, as one update whose rank is the sum of theirs."""
    a = mx.concatenate([update.a for _, update in updates], axis=1)  # (inputs, R)
    b = mx.concatenate([share * update.scale * update.b for share, update in updates], axis=0)  # (R, outputs)
    return lambda x, y: mx.addmm(y, x @ a, b).astype(y.dtype)


class StackedUpdates:
    """Low-rank updates in one stack, from which each row of a batch uses its own.

    Updates stay in the stack once rows have used them, since rows come and go from step to step, and
    building the stack takes longer than a step. Source: Chen et al. 2023, "Punica", arXiv:2310.18547.

    Args:
        low_rank: returns the update of a name; called whenever the stack is built.
    """

    def __init__(self, low_rank: Callable[[str], LowRank]) -> None:
        self._low_rank = low_rank
        self._order: Mapping[str | None, int] = {}
        self._factors: tuple[mx.array, mx.array] | None = None

    def by_row(self, rows: Sequence[str | None]) -> Update:
        """The update in which each row of a batch has its own.

        Args:
            rows: for each row a name, or None for no update; at least one is a name.
        """
        a, b = self._having(rows)
        chosen = mx.array([self._order[row] for row in rows], mx.uint32)  # (B,)

        def added(x: mx.array, y: mx.array) -> mx.array:
            batch, sums = (x, y) if x.ndim > 2 else (x[:, None], y[:, None])  # (B, T, ...)
            if batch.shape[1] == 1:  # copying the factors would cost as much as the products
                inner = mx.gather_mm(batch, a, rhs_indices=chosen)  # (B, 1, R)
                sums = sums + mx.gather_mm(inner, b, rhs_indices=chosen)
            else:
                sums = mx.addmm(sums, batch @ a[chosen], b[chosen])
            return sums.reshape(y.shape).astype(y.dtype)

        return added

    def _having(self, rows: Sequence[str | None]) -> tuple[mx.array, mx.array]:
        """Both factors, (updates, inputs, R) and (updates, R, outputs), of a stack with all of ``rows``."""
        if self._factors is None or not self._order.keys() >= set(rows):
            names = dict.fromkeys((*self._order, *rows))
            self._factors = _side_by_side([None if n is None else self._low_rank(n) for n in names])
            self._order = {name: place for place, name in enumerate(names)}
        return self._factors


def _side_by_side(updates: Sequence[LowRank | None]) -> tuple[mx.array, mx.array]:
    """Both factors, stacked, with smaller ranks padded with zeros; None is all zeros."""
    there = [update for update in updates if update is not None]
    nothing = LowRank(mx.zeros_like(there[0].a), mx.zeros_like(there[0].b), 0.0)
    filled = [nothing if update is None else update for update in updates]
    rank = max(update.a.shape[1] for update in there)
    more = [(0, rank - update.a.shape[1]) for update in filled]
    a = mx.stack([mx.pad(u.a, [(0, 0), m]) for u, m in zip(filled, more, strict=True)])
    b = mx.stack([mx.pad(u.scale * u.b, [m, (0, 0)]) for u, m in zip(filled, more, strict=True)])
    mx.eval(a, b)
    return a, b
