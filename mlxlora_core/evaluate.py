"""``model [+ adapter] -> batches -> sum of nats / sum of tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlxlora_core.data import Example, fixed_batches
from mlxlora_core.loss import Loss, nats
from mlxlora_core.specs import LanguageModel


def evaluate(model: LanguageModel, examples: Sequence[Example], batch_size: int, batches: int = -1) -> Loss:
    """The loss of a model on examples.

    Args:
        model: in whatever state; it is put in evaluation mode and back.
        examples: tokenized rows.
        batch_size: rows a batch; it does not change the result.
        batches: how many batches' worth of the first rows; -1 is all of them.
    """
    module: Any = model
    was_training = module.training
    module.eval()
    total = Loss(0.0, 0)
    for batch in fixed_batches(examples, batch_size, batches):
        total += Loss(float(nats(model, batch)), batch.counted_tokens)
        mx.clear_cache()
    module.train(was_training)
    return total
