"""The loss: nats summed over counted tokens, and how many there were.

Nothing here divides: whoever has all the sums takes the mean, once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxlora_core.model.dropout import at_positions, using_keys
from mlxlora_core.model.head_loss import head_nats
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.training.batches import Batch
from mlxlora_core.training.recomputation import run_recomputed


@dataclass(frozen=True)
class Loss:
    """A sum of cross-entropy.

    Attributes:
        nats: summed over the counted tokens.
        tokens: how many counted.
        positions: how many positions were computed.
        padding: how many of these were padding.
    """

    nats: float
    tokens: int
    positions: int = 0
    padding: int = 0

    @classmethod
    def of(cls, batch: Batch, nats: float) -> Loss:
        """The loss of one batch."""
        return cls(nats, batch.counted_tokens, batch.inputs.size, batch.padding)

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.positions + other.positions,
            self.padding + other.padding,
        )

    @property
    def mean(self) -> float:
        """Nats per counted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean; infinite if that overflows."""
        return math.inf if self.mean > 700 else math.exp(self.mean)


def nats(model: LanguageModel, batch: Batch, recompute: bool = False) -> mx.array:
    """Cross-entropy of a batch in nats, summed over its counted tokens, float32.

    The head runs only at the positions that count, and layers only from ``batch.first`` up.

    Args:
        model: in training mode if the gradient is wanted: see :func:`head_nats`.
        batch: of rows.
        recompute: whether a layer keeps only its input for the backward pass: see :func:`run_recomputed`.
    """
    with using_keys(batch.dropout_keys):
        hidden = hidden_states(model, batch, recompute)
        counted = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
        with at_positions(batch.positions):
            return head_nats(model, counted, batch.targets, batch.weights)


def hidden_states(model: LanguageModel, batch: Batch, recompute: bool = False) -> mx.array:
    """The output of the top layer for each of a batch's inputs, (B, T, D)."""
    hidden = model.embed(batch.inputs) if batch.hidden is None else batch.hidden
    lengths: dict[str, Any] = {"lengths": batch.lengths} if batch.lengths else {}
    if recompute:
        return run_recomputed(model, hidden, batch.first, lengths)
    first: dict[str, Any] = {"first": batch.first} if batch.first else {}  # not every model takes them
    return model.run(hidden, **first, **lengths)
