"""How much memory a training will take, told and held against what is free before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlxlora_core.errors import ResourceError
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.memory import require_memory
from mlxlora_core.model.adapters import trainable
from mlxlora_core.model.folder import Model
from mlxlora_core.model.linears import layers_by_path, linear_shape, linears
from mlxlora_core.training.examples import Examples

_OPTIMIZER_BYTES = 16  # a weight, its gradient and two moments, each float32
_HEAD_WIDTH = 64  # of attention, where a model does not tell: few are narrower


def training_bytes(model: Model, rows: Examples, batch_size: int) -> int:
    """An estimate of what training will take beyond what is loaded, in bytes; right within a factor of 2.

    For each token of the longest batch, what goes into and comes out of every
    linear from the lowest adapted layer up, three logits a word, and the scores
    of attention, all float32; for each weight of the adapter the optimizer's
    numbers.
    """
    adapter = trainable(model.module)
    layer_of = layers_by_path(model.language_model)
    trained = {layer for name in adapter if (layer := layer_of(name)) is not None}
    count = len(model.language_model.layers)
    first = min(trained, default=count)
    shapes = [(layer_of(path), linear_shape(linear)[-2:]) for path, linear in linears(model.module)]
    width = sum(sum(shape) for layer, shape in shapes if layer is not None and layer >= first)
    longest = max(len(example.tokens) for example in rows.examples)
    batch = min(batch_size, len(rows))
    heads = max(1, min(shape[1] for _, shape in shapes) // _HEAD_WIDTH)
    scores = batch * longest**2 * heads * (count - first)
    logits = 3 * model.language_model.vocab_size
    tokens = batch * longest * (width + logits)
    return 4 * (tokens + scores) + _OPTIMIZER_BYTES * sum(tensor.size for tensor in adapter.values())


@contextmanager
def training_memory(model: Model, rows: Examples, batch_size: int) -> Iterator[str]:
    """Refuse training that does not fit into memory; the value is what it needs, in words.

    Raises:
        ResourceError: too little is free, or there turns out to be too little.
    """
    fix = "lower --batch-size, --max-seq-length or --lora-layers"
    need = training_bytes(model, rows, batch_size)
    said = require_memory(need, "training", fix)
    try:
        yield said
    except (MemoryError, RuntimeError) as fault:
        if exhausted(fault) is None:
            raise
        raise ResourceError(f"there is not enough memory although {said}: {fault}", fix=fix) from fault
