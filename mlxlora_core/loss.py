"""The loss: nats summed over counted tokens, and how many there were.

Nothing here divides. A mean is taken once, by whoever has all the sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from mlxlora_core.data import Batch
from mlxlora_core.specs import LanguageModel


@dataclass(frozen=True)
class Loss:
    """A sum of cross-entropy.

    Attributes:
        nats: summed over the counted tokens.
        tokens: how many counted.
    """

    nats: float
    tokens: int

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Nats per counted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean; infinite where that overflows."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


def nats(model: LanguageModel, batch: Batch) -> mx.array:
    """Cross-entropy of a batch in nats, summed over its counted tokens, float32.

    The head runs only at the positions that count.
    """
    hidden = model.run(model.embed(batch.inputs))
    counted = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    return cross_entropy(model.head(counted), batch.targets)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Sum over N of ``logsumexp(logits) - logits[target]``, in float32.

    Args:
        logits: (N, V).
        targets: ids (N,).
    """
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return (mx.logsumexp(logits, axis=-1) - chosen).sum()
