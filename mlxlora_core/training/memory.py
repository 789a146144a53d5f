"""How much memory a training will take, told and held against what is free before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.errors import ResourceError, UsageError
from mlxlora_core.machine.device import memory_for_any_size
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.processors import thread_count
from mlxlora_core.model.adapters import trainable
from mlxlora_core.model.linears import embeddings, layers_by_path, linear_shape, linears
from mlxlora_core.model.loading import Model
from mlxlora_core.model.memory import fits, has_room, measuring_bytes, require_for, sizes_of
from mlxlora_core.training.batches import longest_of
from mlxlora_core.training.examples import Examples
from mlxlora_core.training.prefix import Prefix
from mlxlora_core.training.recomputation import can_recompute
from mlxlora_core.training.reuse import draws_below
from mlxlora_core.training.settings import TrainConfig
from mlxlora_core.training.update import is_compiled

_OPTIMIZER_BYTES = 16  # a weight, its gradient and two moments, each float32
#: of what goes into and comes out of a layer's linears, the share that is kept for the gradient
_KEPT_WIDTH, _KEPT_INPUTS = 0.7, 0.25
#: words of logits that stand in memory at once, and scores of the layer whose gradient is computed
_LOGITS, _SCORES, _WIDTH = 5, 1.5, 1.2

_SWITCH = "--grad-checkpoint on"
FIX = "lower --batch-size, --max-seq-length or --lora-layers"


def training_bytes(model: Model, rows: Examples, batch_size: int, recompute: bool = False) -> int:
    """An estimate of what a step takes beyond what is loaded, in bytes; right within a factor of 1.5.

    From the lowest adapted layer up, what the gradient needs is kept: most of
    what goes into and comes out of the linears, and the scores of attention; or
    with ``recompute`` what enters each, and the rest of one of them. At
    the top come the logits, below them the gradient of a layer. For each weight
    of the adapter there are the optimizer's numbers. See :mod:`mlxlora_core.model.memory`.
    """
    sizes = sizes_of(model.language_model)
    longest = longest_of(rows.examples)
    batch = min(batch_size, len(rows))
    trained = _kept_by_adapter(model)
    first = 0 if _embeds(model) else min(trained, default=len(sizes.widths))
    scores = sizes.scores(batch, longest, longest)
    kept = [
        batch * longest * (_KEPT_WIDTH * width + trained.get(layer, 0.0)) + scores
        for layer, width in enumerate(sizes.widths)
        if layer >= first
    ]
    gradient = _WIDTH * batch * longest * max(sizes.widths, default=0) + _SCORES * scores
    if recompute:
        gradient += max(kept, default=0.0)
        kept = [batch * longest * sizes.dim for _ in kept]
    most = max(
        sizes.logits_bytes(batch * longest, batch, _LOGITS),
        int(gradient * sizes.number_bytes) + sizes.expanded_bytes,
    )
    adapter = sum(tensor.size for tensor in trainable(model.module).values())
    return int(sum(kept) * sizes.number_bytes) + most + _OPTIMIZER_BYTES * adapter


def decide_recompute(model: Model, rows: Examples, config: TrainConfig) -> bool:
    """Whether layers keep only their input for the gradient: where that is asked for, or memory is short.

    Where a training goes on it may come to something else, for it changes no number; where it would,
    in a compiled step that draws from ``mx.random``, it is left alone.

    Args:
        model: with the adapter that trains.
        rows: to train on.
        config: how.

    Raises:
        UsageError: it is asked for, and the architecture cannot.
    """
    possible = can_recompute(model.language_model)
    if config.grad_checkpoint == "on" and not possible:
        raise UsageError(
            "grad_checkpoint cannot be on: this architecture runs all of its layers or none",
            fix="leave it at auto",
        )
    if config.grad_checkpoint != "auto" or not possible:
        return config.grad_checkpoint == "on"
    if is_compiled(config) and draws_below(
        model.language_model, len(model.language_model.layers), by_row=True
    ):
        return False
    plain, less = (training_bytes(model, rows, config.batch_size, way) for way in (False, True))
    return less < plain and not has_room(plain)


def _kept_by_adapter(model: Model) -> dict[int, float]:
    """For each layer with an adapter, numbers a token that are kept beside those of the base.

    The inputs of the linears that have one, as far as they are not kept anyway, and what every vector
    that trains is multiplied by.
    """
    layer_of = layers_by_path(model.language_model)
    vectors: dict[str, int] = {}
    for name, tensor in trainable(model.module).items():
        wrapped = name.rpartition(".")[0]
        vectors[wrapped] = vectors.get(wrapped, 0) + (tensor.size if tensor.ndim == 1 else 0)
    kept = {layer: 0.0 for path in vectors if (layer := layer_of(path)) is not None}
    for path, linear in linears(model.module):
        layer, wrapped = layer_of(path), path.removesuffix(".linear")
        if layer in kept and wrapped in vectors:
            kept[layer] += _KEPT_INPUTS * linear_shape(linear)[-1] + vectors[wrapped]
    return kept


def _embeds(model: Model) -> bool:
    """Whether an embedding is adapted, so that the gradient goes down to it."""
    return any(path.endswith(".linear") for path, _ in embeddings(model.module))


def _validation_bytes(model: Model, rows: Examples, batch_size: int) -> int:
    """What a row for each core takes in a validation, or a single one where those do not fit."""
    sizes, longest = sizes_of(model.language_model), longest_of(rows.examples)
    side_by_side = measuring_bytes(sizes, min(batch_size, len(rows), thread_count()), longest)
    return side_by_side if fits(side_by_side) else measuring_bytes(sizes, 1, longest)


@contextmanager
def training_memory(
    model: Model,
    rows: Mapping[str, Examples],
    config: TrainConfig,
    prefix: Prefix | None = None,
    recompute: bool = False,
    group: Group = ALONE,
) -> Iterator[tuple[int, str]]:
    """Refuse training that does not fit into memory; the value is what it needs, in bytes and in words.

    A validation is to take no more than that: what a row for each core takes is in it.

    Args:
        model: with the adapter that trains.
        rows: split -> its examples.
        config: how it trains.
        prefix: what is kept of the rows, if anything is; how much of it in memory is settled here.
        recompute: whether layers keep only their input for the gradient.
        group: the ranks that train, each of which needs as much.

    Raises:
        ResourceError: too little is free, or there turns out to be too little.
    """
    fix = f"{_SWITCH}, or {FIX}" if config.grad_checkpoint == "off" else FIX
    need, kept = training_bytes(model, rows["train"], config.batch_size, recompute), 0
    with group.sharing_memory():
        if "valid" in rows:
            need = max(need, _validation_bytes(model, rows["valid"], config.batch_size))
        if prefix is not None:
            need = max(need, prefix.filling_bytes(sizes_of(model.language_model)))
            kept = prefix.budget_memory(need)
        said = require_for(need + kept, "training", fix)
    if recompute:
        said += "; layers are computed again for their gradient (--grad-checkpoint), which takes longer"
    try:
        with memory_for_any_size(need):
            yield need, said
    except (MemoryError, RuntimeError) as fault:
        if exhausted(fault) is None:
            raise
        raise ResourceError(f"there is not enough memory although {said}: {fault}", fix=fix) from fault
