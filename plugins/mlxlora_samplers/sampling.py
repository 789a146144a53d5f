"""Ways to change logits (B, V) before a token is drawn from them.

Each function here gives a ``transform(logits, tokens)`` that returns logits
(B, V), with -inf for the tokens that it leaves out. Whatever leaves tokens out
does so after the temperature was applied, and never leaves out the most likely
one. A temperature of 0 leaves only the most likely token in all of them; of
several equally likely ones, that of the lowest id.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxlora_core.api import Transform
from mlxlora_core.ops import on_cpu

_SORTED = 512  # tokens that top-p sorts where they are enough: sorting 32 000 takes 3 ms
_COLDEST = 1e-30  # what a smaller temperature counts as: a float32 would make it 0


def greedy(logits: mx.array, tokens: Sequence[int]) -> mx.array:
    """The most likely token alone."""
    best = mx.argmax(logits, axis=-1, keepdims=True)  # (B, 1)
    nothing = mx.full(logits.shape, -mx.inf)  # (B, V)
    return mx.put_along_axis(nothing, best, mx.take_along_axis(logits, best, axis=-1), axis=-1)


def temperature(temp: float) -> Transform:
    """All tokens, with probability ``softmax(logits / temp)``."""
    if temp == 0:
        return greedy
    return lambda logits, tokens: _heated(logits, temp)


def top_k(temp: float, k: int) -> Transform:
    """The ``k`` most likely tokens; on a tie at the edge, those of the lowest ids.

    Source: Fan et al. 2018, arXiv:1805.04833.
    """
    if temp == 0:
        return greedy

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        count = min(k, logits.shape[-1])
        edge = mx.topk(logits, count, axis=-1).min(axis=-1, keepdims=True)  # (B, 1)
        above, level = logits > edge, logits == edge  # (B, V)
        room = count - above.astype(mx.int32).sum(axis=-1, keepdims=True)  # (B, 1)
        kept = above | (level & (mx.cumsum(level.astype(mx.int32), axis=-1) <= room))  # (B, V)
        return _only(kept, _heated(logits, temp))

    return transform


def top_p(temp: float, p: float) -> Transform:
    """The smallest set of tokens whose probabilities, at ``temp``, reach ``p`` together.

    Tokens enter the set from the most likely one down; at least that one is in
    it. With ``p`` = 1 all are.
    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    if temp == 0:
        return greedy
    if p == 1:
        return temperature(temp)  # the sum may round to 1 before the last token

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        heated = _heated(logits, temp)
        order = _most_likely(heated)  # (B, at most _SORTED)
        ranked = mx.take_along_axis(heated, order, axis=-1)
        kept = _reaching(p, heated, ranked)
        if order.shape != heated.shape and (kept & (ranked == ranked[:, -1:])).any():
            order = mx.argsort(-heated, axis=-1)  # (B, V): others take part too
            ranked = mx.take_along_axis(heated, order, axis=-1)
            kept = _reaching(p, heated, ranked)
        nothing = mx.full(heated.shape, -mx.inf)
        return mx.put_along_axis(nothing, order, _only(kept, ranked), axis=-1)  # (B, V)

    return transform


def min_p(temp: float, p: float) -> Transform:
    """The tokens whose probability, at ``temp``, is at least ``p`` times the highest one.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    if temp == 0:
        return greedy
    least = math.log(p) if p else -math.inf

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        heated = _heated(logits, temp)
        return _only(heated >= least, heated)

    return transform


def repetition_penalty(penalty: float, window: int | None) -> Transform:
    """Logits of tokens that came before, of the last ``window`` if given, divided by ``penalty``.

    A negative one is multiplied by it, so that a penalty above 1 makes every such
    token less likely. How often it came does not count.
    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1 (without the case of negative logits).
    """
    return _of_the_past(window, lambda found, _: mx.where(found > 0, found / penalty, found * penalty))


def presence_penalty(penalty: float, window: int | None) -> Transform:
    """Logits of tokens that came before, of the last ``window`` if given, less ``penalty``.

    How often one came does not count. A negative penalty makes them more likely.
    """
    return _of_the_past(window, lambda found, _: found - penalty)


def frequency_penalty(penalty: float, window: int | None) -> Transform:
    """As :func:`presence_penalty`, ``penalty`` taken away for each time that a token came."""
    return _of_the_past(window, lambda found, times: found - penalty * times)


def _of_the_past(window: int | None, change: Callable[[mx.array, mx.array], mx.array]) -> Transform:
    """A transform that changes the logits of the tokens that came before, of the last ``window`` if given.

    Args:
        window: None is all tokens.
        change: new logits (B, seen) out of those of such tokens and of how often each came.
    """

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        counts = sorted(Counter(tokens if window is None else tokens[-window:]).items())
        if not counts:
            return logits
        seen = mx.broadcast_to(mx.array(counts).T[:, None], (2, logits.shape[0], len(counts)))
        ids, times = seen[0], seen[1].astype(mx.float32)  # (B, seen)
        changed = change(mx.take_along_axis(logits, ids, axis=-1), times)
        return mx.put_along_axis(logits, ids, changed, axis=-1)  # (B, V)

    return transform


def _most_likely(logits: mx.array) -> mx.array:
    """Ids (B, at most _SORTED) of the most likely tokens, from the most likely down, lower ids first."""
    if logits.shape[-1] <= _SORTED or not on_cpu():  # a GPU sorts them faster than the host waits for it
        return mx.argsort(-logits, axis=-1)
    ids = mx.sort(mx.argpartition(-logits, _SORTED - 1, axis=-1)[:, :_SORTED], axis=-1)
    order = mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1)
    return mx.take_along_axis(ids, order, axis=-1)


def _reaching(p: float, logits: mx.array, ranked: mx.array) -> mx.array:
    """Which of the ``ranked`` logits, of all ``logits``, are needed to reach the probability ``p``."""
    total = mx.logsumexp(logits, axis=-1, keepdims=True)  # (B, 1)
    return mx.cumsum(mx.exp(ranked - total), axis=-1, inclusive=False) < p


def _heated(logits: mx.array, temp: float) -> mx.array:
    """(logits - their highest) / temp: 0 for the most likely token, less for all others."""
    return (logits - logits.max(axis=-1, keepdims=True)) / max(temp, _COLDEST)


def _only(kept: mx.array, logits: mx.array) -> mx.array:
    """``logits`` of the tokens ``kept``, -inf for all others."""
    return mx.where(kept, logits, -mx.inf)
