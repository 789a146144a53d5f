"""Locally typical sampling (Meister et al. 2022, arXiv:2202.00666)."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxlora_core.api import Transform


def sampler(temp: float, mass: float) -> Transform:
    """Leave the tokens whose surprise -log p is closest to the entropy of all of them.

    Args:
        temp: divides the logits; 0 is argmax.
        mass: the closest tokens that reach this probability together take part,
            one at least (the set of eq. 10 of the paper).
    """

    def transform(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        """Logits (B, V) with -inf for the tokens that do not take part."""
        if temp == 0:
            best = mx.argmax(logits, axis=-1, keepdims=True)
            return mx.where(mx.arange(logits.shape[-1]) == best, logits, -mx.inf)
        logp = logits / temp
        logp = logp - mx.logsumexp(logp, axis=-1, keepdims=True)
        p = mx.exp(logp)
        # A token of probability 0 adds nothing to the entropy, though its log is infinite.
        entropy = -mx.where(p > 0, p * logp, 0).sum(axis=-1, keepdims=True)
        apart = mx.abs(-logp - entropy)
        order = mx.argsort(apart, axis=-1)
        closest = mx.take_along_axis(p, order, axis=-1)
        before = mx.cumsum(closest, axis=-1) - closest
        # The furthest that takes part; all at that distance do, so that the order of tokens does not matter.
        edge = mx.where(before < mass, mx.take_along_axis(apart, order, axis=-1), 0).max(
            axis=-1, keepdims=True
        )
        return mx.where(apart <= edge, logp, -mx.inf)

    return transform
