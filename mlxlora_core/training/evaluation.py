"""``model [+ adapter] -> batches -> sum of nats / sum of tokens``."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from functools import partial

from mlxlora_core.errors import DivergedError
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.training.batches import fixed_rows
from mlxlora_core.training.events import Advanced
from mlxlora_core.training.examples import Example
from mlxlora_core.training.loss import Loss, nats
from mlxlora_core.training.parallel import side_by_side


def evaluate(model: LanguageModel, examples: Sequence[Example], batch_size: int, batches: int = -1) -> Loss:
    """The loss of a model on examples; see :func:`evaluating`, which has the same arguments."""
    work = evaluating("", model, examples, batch_size, batches)
    while True:
        try:
            next(work)
        except StopIteration as end:
            loss: Loss = end.value
            return loss


def evaluating(
    what: str, model: LanguageModel, examples: Sequence[Example], batch_size: int, batches: int = -1
) -> Generator[Advanced, None, Loss]:
    """The loss of a model on examples, as the value of the generator; how far it is after each batch.

    Args:
        what: what the events call it.
        model: in whatever state; it is put in evaluation mode and back.
        examples: tokenized rows, one at least.
        batch_size: rows a batch; it does not change the loss of the rows.
        batches: how many batches, from rows all over ``examples``; -1 is all of them.

    Raises:
        DivergedError: the loss is not finite.
    """
    was_training = model.training
    model.eval()
    total = Loss(0.0, 0)
    try:
        parts = list(fixed_rows(examples, batch_size, batches))
        for done, rows in enumerate(parts, start=1):
            for part, value in side_by_side(partial(nats, model), examples, rows):
                total += Loss(float(value), part.counted_tokens)
            yield Advanced(what, done, len(parts))
    finally:
        model.train(was_training)
    if not math.isfinite(total.nats):
        raise DivergedError(
            "the loss of the model is not finite",
            fix="check the weights, or train with a lower --learning-rate",
        )
    return total
