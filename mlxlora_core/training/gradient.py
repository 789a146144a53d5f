"""``rows -> (loss, norm, gradient)``: what an update is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.training.batches import Collator
from mlxlora_core.training.loss import Loss, nats
from mlxlora_core.training.parallel import side_by_side


def mean_gradient(
    model: LanguageModel, collate: Collator, rows: Sequence[int], batch_size: int
) -> tuple[Loss, float, Any]:
    """Loss, norm and mean gradient over the counted tokens of ``rows``.

    Micro-batches add nats, and gradients of nats; the one division by the
    number of tokens comes after the last of them.
    """
    value_and_grad = nn.value_and_grad(model, lambda batch: nats(model, batch))
    total: Any = None
    loss = Loss(0.0, 0)
    for start in range(0, len(rows), batch_size):
        for batch, (value, gradient) in side_by_side(
            value_and_grad, collate, rows[start : start + batch_size]
        ):
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            loss += Loss.of(batch, float(value))
        mx.eval(total)
    total = tree_map(lambda g: g / loss.tokens, total)
    squares = [leaf.astype(mx.float32).square().sum() for leaf in dict(tree_flatten(total)).values()]
    return loss, math.sqrt(float(mx.stack(squares).sum())), total


def clipped_to(gradient: Any, norm: float, limit: float) -> Any:
    """``gradient`` shrunk to the norm ``limit``."""
    return tree_map(lambda g: g * (limit / norm), gradient)
