"""A model in memory, filled from a model folder or straight from another library's files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxlora_core.errors import ModelError
from mlxlora_core.files import durable
from mlxlora_core.files.tensor_file import tensor_digest
from mlxlora_core.machine.device import compute_dtype
from mlxlora_core.machine.memory import free_memory_bytes, require_memory
from mlxlora_core.model.events import left_out
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import (
    StackedLinear,
    StoredEmbedding,
    StoredLinear,
    StoredStackedLinear,
    replace_modules,
)
from mlxlora_core.model.stored import StoredModel, bytes_of, open_stored
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.model.weights import SMALLER
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.values import LazyTensor

#: the share of the free memory that weights may take when they are expanded to float32 on a CPU
EXPANDED_SHARE = 0.5
#: for the stacks of the four threads with which MLX reads files; if one cannot start, MLX waits forever
READERS_BYTES = 4 * 2**23


@dataclass(frozen=True)
class Model:
    """A model in memory.

    Attributes:
        folder: the folder or file that it was read from.
        language_model: with frozen parameters, ready to compute.
        tokenizer: of the model.
        config: its config.json, or the one that converting it would write.
        quantization: how its linears are quantized, or None.
        architecture: the plugin component that built it.
        fingerprint: of config, tensors and tokenizer; the same for the same base in any format.
        note: why the way that the weights are held makes it slower, or nothing.
        notes: what was assumed about another library's model, or changed in it.
        name: what to find it by again, such as ``org/name@commit``; nothing if that is its path.
    """

    folder: Path
    language_model: LanguageModel
    tokenizer: CheckedTokenizer
    config: Mapping[str, Any]
    quantization: Choice | None
    architecture: Component
    fingerprint: str
    note: str
    notes: tuple[str, ...] = ()
    name: str = ""

    @property
    def module(self) -> nn.Module:
        """The language model, typed as an MLX module."""
        return self.language_model

    def sequence_limit(self, max_seq_length: int) -> int:
        """The longest row to train on: ``max_seq_length``, or the model's context if that is less."""
        return min(max_seq_length, self.language_model.context_tokens or max_seq_length)


def load(path: Path, registry: Registry, quantization: Quantization | None = None) -> Model:
    """Read a model: a model folder, or anything that a weight loader opens.

    Args:
        path: folder or file.
        registry: where plugins are looked up.
        quantization: how to quantize dense linears as they are read; the result equals that of
            converting with the same options and loading the folder. None to take the weights as they are.

    Raises:
        UsageError: there is nothing to quantize, or the quantizer takes none of it.
        ModelError: a part is missing, damaged or does not fit the others (all tensors that do not fit
            are listed), or the folder was replaced while it was read.
        SafetyError: a file wants to run code.
        ResourceError: the model does not fit into memory.
        PluginError: no plugin restores its quantization, or one breaks its contract.
    """
    before = durable.version(path)
    stored = open_stored(path, registry, whole=True, quantization=quantization)
    note = _too_large_to_expand(stored)
    if note:
        _keep_stored(stored.module)
    digests = _fill(stored)
    if durable.version(path) != before:
        raise ModelError("was replaced while it was read", where=path, fix="try again")
    return model_of(stored, stored.fingerprint(digests), note)


def outline(
    path: Path, registry: Registry, quantization: Quantization | None = None
) -> tuple[Model, dict[str, LazyTensor]]:
    """A model with empty parameters, and the tensors of its files, which are read on demand.

    The arguments are those of :func:`load`.

    Raises:
        UsageError: as :func:`load`.
        ModelError: as :func:`load`.
        PluginError: as :func:`load`.
    """
    stored = open_stored(path, registry, quantization=quantization)
    return model_of(stored, stored.fingerprint(), ""), stored.tensors


def model_of(stored: StoredModel, fingerprint: str, note: str) -> Model:
    """The :class:`Model` of a stored model whose parameters have been filled, or will not be."""
    return Model(
        stored.path,
        stored.language_model,
        stored.tokenizer,
        stored.config,
        stored.quantization,
        stored.architecture,
        fingerprint,
        note,
        (*stored.notes, *left_out(stored.unread), *([stored.packing.words()] if stored.packing else [])),
    )


def _computed(stored: mx.Dtype) -> mx.Dtype:
    """The type in which a stored tensor is kept in memory."""
    return compute_dtype(stored) if mx.issubdtype(stored, mx.floating) else stored


def _too_large_to_expand(model: StoredModel) -> str:
    """Why the weights stay in the type that they are stored in; nothing if they are expanded once.

    A CPU computes in float32. Expanded weights may take :data:`EXPANDED_SHARE` of the free memory;
    the rest is for the work.

    Raises:
        ResourceError: not even the stored weights fit.
    """
    tensors = model.tensors
    stored = sum(map(bytes_of, tensors.values()))
    packing = model.packing.work_bytes if model.packing is not None else 0
    expanded = sum(math.prod(t.shape) * _computed(getattr(mx, t.dtype)).size for t in tensors.values())
    require_memory(stored + packing + READERS_BYTES, "the model", SMALLER)
    free = free_memory_bytes()
    if expanded == stored or free is None or expanded <= EXPANDED_SHARE * free:
        return ""
    return (
        f"the weights are expanded for each product, which is slower: in float32 they take "
        f"{expanded / 1e9:.2f} GB, more than {EXPANDED_SHARE:.0%} of the {free / 1e9:.2f} GB that are free"
    )


def _keep_stored(module: nn.Module) -> None:
    """Make dense linears and embeddings keep their weights as stored, and expand them on each use."""
    kinds: dict[type, Any] = {
        nn.Linear: StoredLinear,
        nn.Embedding: StoredEmbedding,
        StackedLinear: StoredStackedLinear,
    }
    found = module.named_modules()
    replace_modules(
        module, {path: kinds[type(child)](child) for path, child in found if type(child) in kinds}
    )


def _fill(stored: StoredModel) -> dict[str, str]:
    """Read every parameter, in the type to compute with; empties ``stored.tensors``.

    Returns:
        The digests of the tensors if they were not known before, else nothing.
    """
    owners = dict(stored.module.named_modules())
    tensors, digests, ready = stored.tensors, {}, []
    try:
        for name in list(tensors):
            owner, _, part = name.rpartition(".")
            tensor = tensors[name].read()
            if stored.digests is None:
                digests[name] = tensor_digest(name, tensor)
            tensor = _prepared(owners.get(owner), part, tensor)
            # One by one: all at once, the stored weights would be in memory together with the expanded ones.
            mx.eval(tensor)
            ready.append((name, tensor))
            del tensors[name]
    except RuntimeError as fault:
        # If MLX finds no memory to read into, it only says that it could not read.
        require_memory(sum(map(bytes_of, tensors.values())), "the rest of the model", SMALLER)
        raise ModelError(f"the weights cannot be read: {fault}", where=stored.path) from fault
    stored.module.update(tree_unflatten(ready))
    stored.module.freeze()
    return digests


def _prepared(owner: nn.Module | None, part: str, tensor: mx.array) -> mx.array:
    """A parameter of ``owner``, in the type to compute with."""
    if part == "weight" and isinstance(owner, (StoredLinear, StoredStackedLinear, StoredEmbedding)):
        return tensor
    return tensor.astype(_computed(tensor.dtype))
