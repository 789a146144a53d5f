"""``rows -> sums of nats and of their gradients``: what an update is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxlora_core.model.dropout import drops, name_dropouts
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import bind_products
from mlxlora_core.training.batches import Batch, Collator
from mlxlora_core.training.dropout_keys import dropout_keys, step_key
from mlxlora_core.training.loss import Loss, nats
from mlxlora_core.training.parallel import side_by_side
from mlxlora_core.training.reuse import draws_below

#: nats of a batch, and their gradient as a tree like the parameters that train
Summed: TypeAlias = tuple[mx.array, Any]


@dataclass(frozen=True)
class Sums:
    """Sums over the batches of a step; the device may still be computing its arrays.

    Attributes:
        nats: of each batch, or of each part of a batch, in order.
        counts: the tokens and positions; its own nats are 0.
        gradient: of the sum of all nats, as a tree like the parameters that train; None for no rows.
    """

    nats: tuple[mx.array, ...]
    counts: Loss
    gradient: Any

    @property
    def loss(self) -> Loss:
        """The loss, summed on the host, which waits for the device."""
        return replace(self.counts, nats=sum(float(value) for value in self.nats))

    @property
    def total(self) -> mx.array:
        """The nats, summed on the device."""
        return self.nats[0] if len(self.nats) == 1 else mx.stack(list(self.nats)).sum()

    @property
    def tokens(self) -> mx.array:
        """How many tokens counted."""
        return mx.array(float(self.counts.tokens))


class Gradients:
    """Sums of nats, and of their gradients, over rows.

    Args:
        model: some of whose parameters train.
        collate: makes the batches; when compiled, in as few shapes as possible.
        batch_size: rows per batch.
        compiled: whether nats and gradient of a batch are one compiled function of its arrays.
        recompute: whether layers keep only their input for the backward pass. If they also draw from
            ``mx.random``, nothing is compiled, since a compiled layer cannot draw the same numbers twice.

    Attributes:
        compiles: for how many shapes of batches the function was compiled.
    """

    def __init__(
        self,
        model: LanguageModel,
        collate: Collator,
        batch_size: int,
        compiled: bool,
        recompute: bool = False,
    ) -> None:
        self._model, self._collate, self._batch_size = model, collate, batch_size
        self._recompute = recompute
        self._module: Any = model
        self._drops = drops(self._module)
        name_dropouts(self._module)
        drawing = compiled and recompute and draws_below(model, len(model.layers), by_row=True)
        self._compiled, self.compiles = compiled and not drawing, 0
        self._begun: Any = None
        self._key = 0

    def __call__(self, rows: Sequence[int]) -> Sums:
        """The sums over some rows; on return the device has been given all batches but the last."""
        total: Any = None
        self._key = step_key()
        values, counts = [], Loss(0.0, 0)
        for start in range(0, len(rows), self._batch_size):
            if total is not None:
                self._begin(total)
            for batch, (value, gradient) in self._parts(rows[start : start + self._batch_size]):
                total = gradient if total is None else tree_map(mx.add, total, gradient)
                values.append(value)
                counts += Loss.of(batch, 0.0)
        self._begun = None
        return Sums(tuple(values), counts, total)

    def _parts(self, rows: Sequence[int]) -> Iterator[tuple[Batch, Summed]]:
        """The parts that a batch is computed in, each with its sums."""
        if not self._compiled:
            lengths = [len(self._collate.examples[row].tokens) for row in rows]
            yield from side_by_side(self._plain, self._batch, rows, lengths)
            return
        batch = self._batch(rows)
        arrays: dict[str, Any] = {n: x for n, x in vars(batch).items() if isinstance(x, mx.array)}
        trained = self._module.trainable_parameters()
        try:
            summed = self._as_compiled(arrays, batch.first)
        finally:
            self._module.update(trained)  # tracing leaves its placeholders in the module
        yield batch, summed

    def _batch(self, rows: Sequence[int]) -> Batch:
        """The batch of some rows, with keys for dropout if the model has any."""
        batch = self._collate(rows)
        return replace(batch, dropout_keys=dropout_keys(self._key, rows, batch)) if self._drops else batch

    def _begin(self, total: Any) -> None:
        """Let the device start on a batch once it has finished the one before.

        Any earlier, memory would have to hold what both batches keep for the backward pass.
        """
        mx.eval(self._module.trainable_parameters(), self._begun)
        mx.async_eval(total)
        self._begun = total

    @cached_property
    def _plain(self) -> Callable[[Batch], Summed]:
        """Nats of a batch and their gradient."""
        model, recompute = self._model, self._recompute
        function: Any = nn.value_and_grad(model, lambda batch: nats(model, batch, recompute))
        return function  # type: ignore[no-any-return]  # MLX's functions are not annotated

    @cached_property
    def _as_compiled(self) -> Callable[[dict[str, Any], int], Summed]:
        """The same for the arrays of a batch, compiled; parameters and random state are captured inputs."""

        def traced(arrays: dict[str, Any], first: int) -> Summed:
            self.compiles += 1
            return self._plain(Batch(**arrays, first=first))

        bind_products(self._module)
        return mx.compile(traced, inputs=[self._module.state, mx.random.state], outputs=[mx.random.state])


def mean_gradient(
    model: LanguageModel, collate: Collator, rows: Sequence[int], batch_size: int, recompute: bool = False
) -> tuple[Loss, float, Any]:
    """Loss, norm and mean gradient over the counted tokens of ``rows``, without an update.

    Micro-batches sum nats and gradients of nats; the only division, by the number of tokens, comes
    after the last of them.
    """
    sums = Gradients(model, collate, batch_size, compiled=False, recompute=recompute)(rows)
    mean = mean_of(sums.gradient, sums.counts.tokens)
    return sums.loss, math.sqrt(float(norm_squared(mean))), mean


def mean_of(gradient: Any, tokens: int | mx.array) -> Any:
    """The mean of a gradient that was summed over so many tokens."""
    return tree_map(lambda g: (g / tokens).astype(g.dtype), gradient)


def norm_squared(gradient: Any) -> mx.array:
    """The sum of the squares of all entries, float32."""
    leaves = dict(tree_flatten(gradient)).values()
    return mx.stack([leaf.astype(mx.float32).square().sum() for leaf in leaves]).sum()
