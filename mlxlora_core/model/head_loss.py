"""Output head and cross-entropy in one, in chunks of rows where all logits at once would be large.

With a large vocabulary, logits are the largest arrays of a training: for 2048 tokens and a
vocabulary of 128 000 they take 1 GB, and the cross-entropy with its gradient five times that. So
large ones are computed a chunk of rows at a time. In training, the gradient of a chunk is computed
together with its loss, so that nothing is computed twice and its logits are not kept (as in Hsu et
al. 2024, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.machine.device import on_cpu
from mlxlora_core.model.dropout import at_positions
from mlxlora_core.model.expansion import expanded_once
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import layers_by_path
from mlxlora_core.model.ops import cross_entropy

#: bytes of a chunk of float32 logits, on a CPU for each stream
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 64 << 20, 256 << 20
#: with fewer chunks than this, memory is not worth the other rounding, and there is a single one
LEAST_CHUNKS = 2


def chunk_rows(rows: int, vocab_size: int) -> int:
    """How many rows go through the head at once: all of them, or chunks of nearly equal size."""
    most = max(1, (CPU_CHUNK_BYTES if on_cpu() else GPU_CHUNK_BYTES) // (4 * vocab_size))
    if rows <= LEAST_CHUNKS * most:
        return rows
    return -(-rows // -(-rows // most))


def head_nats(
    model: LanguageModel, hidden: mx.array, targets: mx.array, weights: mx.array | None = None
) -> mx.array:
    """Cross-entropy in nats, summed over rows, float32.

    If there are chunks and the model is in training mode, the gradient is computed along with the loss.
    In evaluation mode the gradient is also right, but takes the memory of all chunks.

    Args:
        model: whose head runs. Only its parameters outside of the layers get a gradient here.
        hidden: the output of the top layer, (N, D).
        targets: ids (N,).
        weights: of the rows, float32 (N,); None is 1 for all.
    """
    size = chunk_rows(len(hidden), model.vocab_size)
    if size >= len(hidden):
        return cross_entropy(model.head(hidden), targets, weights)
    chunks = [slice(start, start + size) for start in range(0, len(hidden), size)]

    def nats_of(rows: mx.array, chunk: slice) -> mx.array:
        weight = None if weights is None else weights[chunk]
        with at_positions(chunk):
            return cross_entropy(model.head(rows), targets[chunk], weight)

    with expanded_once():
        return (_with_gradient if model.training else _one_by_one)(model, hidden, chunks, nats_of)


_Nats = Callable[[mx.array, slice], mx.array]


def _one_by_one(model: LanguageModel, hidden: mx.array, chunks: list[slice], nats_of: _Nats) -> mx.array:
    """The sum over the chunks, each of which waits for the one before."""
    total = nats_of(hidden[chunks[0]], chunks[0])
    for chunk in chunks[1:]:
        total = total + nats_of(mx.depends(hidden[chunk], [total]), chunk)
    return total


def _with_gradient(model: LanguageModel, hidden: mx.array, chunks: list[slice], nats_of: _Nats) -> mx.array:
    """The same, with the gradient of each chunk computed before the next one starts."""
    module: Any = model
    layer_of = layers_by_path(model)
    parameters: dict[str, mx.array] = dict(tree_flatten(module.trainable_parameters()))
    trained = {name: tensor for name, tensor in parameters.items() if layer_of(name) is None}

    def nats_with(rows: mx.array, tensors: list[mx.array], chunk: slice) -> mx.array:
        module.update(tree_unflatten(list(zip(trained, tensors, strict=True))))
        return nats_of(rows, chunk)

    compute = mx.value_and_grad(nats_with, argnums=(0, 1) if trained else 0)

    @mx.custom_function
    def summed(hidden: mx.array, *tensors: mx.array) -> tuple[mx.array, ...]:
        """The sum, and its gradient with respect to each argument."""
        total, by_tensors = mx.zeros(()), [mx.zeros_like(tensor) for tensor in tensors]
        by_rows: list[mx.array] = []
        for chunk in chunks:
            rows = hidden[chunk]
            if by_rows:
                rows = mx.depends(rows, [total, by_rows[-1], *by_tensors])
            value, found = compute(rows, list(tensors), chunk)
            more = found if trained else (found, [])
            total = total + value
            by_rows.append(more[0])
            by_tensors = [held + new for held, new in zip(by_tensors, more[1], strict=True)]
        return total, mx.concatenate(by_rows), *by_tensors

    @summed.vjp
    def summed_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        gradients = [(cotangents[0] * gradient).astype(gradient.dtype) for gradient in outputs[1:]]
        return gradients if trained else gradients[0]

    try:
        total: Any = summed(hidden, *trained.values())
        return cast(mx.array, total[0])
    finally:
        module.update(tree_unflatten(list(trained.items())))  # tracing leaves its placeholders in the module
