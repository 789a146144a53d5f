"""The loss: nats summed over counted tokens, and how many there were.

Nothing here divides. A mean is taken once, by whoever has all the sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.ops import cross_entropy
from mlxlora_core.training.batches import Batch


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
        return math.inf if self.mean > 700 else math.exp(self.mean)


def nats(model: LanguageModel, batch: Batch) -> mx.array:
    """Cross-entropy of a batch in nats, summed over its counted tokens, float32.

    The head runs only at the positions that count, and layers from the one on whose input is not known.
    """
    if batch.hidden is None:
        hidden = model.run(model.embed(batch.inputs))
    else:
        hidden = model.run(batch.hidden, first=batch.first)
    counted = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    return cross_entropy(model.head(counted), batch.targets)
