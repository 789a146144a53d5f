"""Ways to draw a token from logits (B, V).

Each function here gives a ``sample(logits, tokens, key)`` that returns ids
(B,). Whatever leaves tokens out does so after the temperature was applied, and
never leaves out the most likely one. A temperature of 0 is the most likely
token in all of them; of several equally likely ones, that of the lowest id.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from mlxlora_core.api import Sample

_COLDEST = 1e-30  # what a smaller temperature counts as: a float32 would make it 0


def greedy(logits: mx.array, tokens: Sequence[int], key: mx.array) -> mx.array:
    """The most likely token."""
    return mx.argmax(logits, axis=-1)


def temperature(temp: float) -> Sample:
    """Any token, with probability ``softmax(logits / temp)``."""
    if temp == 0:
        return greedy

    def sample(logits: mx.array, tokens: Sequence[int], key: mx.array) -> mx.array:
        return mx.random.categorical(_heated(logits, temp), key=key)

    return sample


def top_k(temp: float, k: int) -> Sample:
    """One of the ``k`` most likely tokens; on a tie at the edge, those of the lowest ids.

    Source: Fan et al. 2018, arXiv:1805.04833.
    """
    if temp == 0:
        return greedy

    def sample(logits: mx.array, tokens: Sequence[int], key: mx.array) -> mx.array:
        count = min(k, logits.shape[-1])
        edge = mx.topk(logits, count, axis=-1).min(axis=-1, keepdims=True)
        above, level = logits > edge, logits == edge
        room = count - above.astype(mx.int32).sum(axis=-1, keepdims=True)
        kept = above | (level & (mx.cumsum(level.astype(mx.int32), axis=-1) <= room))
        return mx.random.categorical(_only(kept, _heated(logits, temp)), key=key)

    return sample


def top_p(temp: float, p: float) -> Sample:
    """One of the smallest set of tokens whose probabilities, at ``temp``, reach ``p`` together.

    Tokens enter the set from the most likely one down; at least that one is in
    it. With ``p`` = 1 all are.
    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    if temp == 0:
        return greedy
    if p == 1:
        return temperature(temp)  # the sum may round to 1 before the last token

    def sample(logits: mx.array, tokens: Sequence[int], key: mx.array) -> mx.array:
        heated = _heated(logits, temp)
        order = mx.argsort(-heated, axis=-1)
        ranked = mx.take_along_axis(heated, order, axis=-1)
        before = mx.cumsum(mx.softmax(ranked, axis=-1), axis=-1, inclusive=False)
        rank = mx.random.categorical(_only(before < p, ranked), key=key)
        return mx.take_along_axis(order, rank[:, None], axis=-1)[:, 0]

    return sample


def min_p(temp: float, p: float) -> Sample:
    """One of the tokens whose probability, at ``temp``, is at least ``p`` times the highest one.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    if temp == 0:
        return greedy
    least = math.log(p) if p else -math.inf

    def sample(logits: mx.array, tokens: Sequence[int], key: mx.array) -> mx.array:
        heated = _heated(logits, temp)
        return mx.random.categorical(_only(heated >= least, heated), key=key)

    return sample


def _heated(logits: mx.array, temp: float) -> mx.array:
    """(logits - their highest) / temp: 0 for the most likely token, less for all others."""
    return (logits - logits.max(axis=-1, keepdims=True)) / max(temp, _COLDEST)


def _only(kept: mx.array, logits: mx.array) -> mx.array:
    """``logits`` with a chance for the tokens ``kept`` alone."""
    return mx.where(kept, logits, -mx.inf)
