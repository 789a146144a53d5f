"""``model [+ adapter] -> batches -> sum of nats / sum of tokens``."""

from __future__ import annotations

import math
import struct
from collections.abc import Generator, Iterator, Sequence
from functools import partial

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.errors import DivergedError
from mlxlora_core.machine.memory import free_memory_bytes
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.memory import Sizes, fits, measuring_bytes, require_for, sizes_of
from mlxlora_core.training.batches import Collator, fixed_rows, longest_of
from mlxlora_core.training.events import Advanced, value_of
from mlxlora_core.training.examples import Example
from mlxlora_core.training.loss import Loss, nats
from mlxlora_core.training.parallel import side_by_side

#: the share of the free memory to take if a whole batch does not fit
SHARE = 0.7
_FORM = "<d3q"  # how a loss is packed for other ranks


def room_for(
    model: LanguageModel, examples: Sequence[Example], batch_size: int, group: Group = ALONE
) -> tuple[int, str]:
    """How many bytes of memory an evaluation may take, and what it needs, in words.

    That is what the longest batch takes; if less is free for this rank, it is a share of that, and
    batches are measured in smaller parts.

    Raises:
        ResourceError: there is too little memory for the longest row.
    """
    sizes, longest = sizes_of(model), longest_of(examples)
    need = measuring_bytes(sizes, min(batch_size, len(examples)), longest)
    with group.sharing_memory():
        if not fits(need):
            free = int(SHARE * (free_memory_bytes() or 0))
            need = min(need, max(free, measuring_bytes(sizes, 1, longest)))
        fix = "lower --max-seq-length, or use a smaller model"
        return need, require_for(need, "measuring the loss", fix)


def evaluate(
    model: LanguageModel,
    examples: Sequence[Example],
    batch_size: int,
    batches: int = -1,
    most_bytes: int | None = None,
    collate: Collator | None = None,
    group: Group = ALONE,
) -> Loss:
    """The loss of a model on examples; see :func:`evaluating` for the arguments."""
    return value_of(evaluating("", model, examples, batch_size, batches, most_bytes, collate, group))


def evaluating(
    what: str,
    model: LanguageModel,
    examples: Sequence[Example],
    batch_size: int,
    batches: int = -1,
    most_bytes: int | None = None,
    collate: Collator | None = None,
    group: Group = ALONE,
) -> Generator[Advanced, None, Loss]:
    """Yields progress after each batch; the return value of the generator is the loss on the examples.

    Args:
        what: what the events call this evaluation.
        model: in any mode; it is put in evaluation mode and back.
        examples: tokenized rows, at least one.
        batch_size: rows per batch; it does not change the loss.
        batches: how many batches, spread evenly over ``examples``; -1 is all rows.
        most_bytes: the memory that it may take; larger batches are measured in parts of at least one
            row. None is what :func:`room_for` finds.
        collate: makes the batches, if not directly from ``examples``.
        group: the ranks that share the rows; each calls this, and gets the loss over all of them.

    Raises:
        DivergedError: the loss is not finite.
        ResourceError: there is too little memory.
    """
    if most_bytes is None:
        most_bytes, _ = room_for(model, examples, batch_size, group)
    sizes = sizes_of(model)
    was_training = model.training
    model.eval()
    total, collate = Loss(0.0, 0), collate or Collator(examples)
    try:
        parts = list(fixed_rows(examples, batch_size, batches, group))
        for done, rows in enumerate(parts, start=1):
            for few in _that_fit(sizes, examples, rows, most_bytes):
                lengths = [len(examples[row].tokens) for row in few]
                for part, value in side_by_side(partial(nats, model), collate, few, lengths):
                    total += Loss.of(part, float(value))
            yield Advanced(what, done, len(parts))
    finally:
        model.train(was_training)
    total = _of_all(group, total)
    if not math.isfinite(total.nats):
        raise DivergedError(
            "the loss of the model is not finite",
            fix="check the weights, or train with a lower --learning-rate",
        )
    return total


def _of_all(group: Group, loss: Loss) -> Loss:
    """The sum over all ranks, the same to the bit on each."""
    if group.size == 1:
        return loss
    given = group.share(struct.pack(_FORM, loss.nats, loss.tokens, loss.positions, loss.padding))
    return sum((Loss(*struct.unpack(_FORM, part)) for part in given), Loss(0.0, 0))


def _that_fit(
    sizes: Sizes, examples: Sequence[Example], rows: Sequence[int], most_bytes: int
) -> Iterator[Sequence[int]]:
    """The rows of a batch in parts that take at most ``most_bytes`` of memory, or one by one."""
    longest = longest_of([examples[row] for row in rows])
    count = len(rows)
    while count > 1 and measuring_bytes(sizes, count, longest) > most_bytes:
        count -= -(-count // 8)
    return (rows[start : start + count] for start in range(0, len(rows), count))
