"""The model folder: config.json, the weights and the tokenizer, read whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files import durable, tensor_file
from mlxlora_core.files.documents import read_json
from mlxlora_core.files.targets import hold_only_files
from mlxlora_core.files.tensor_checks import mismatches
from mlxlora_core.machine.device import compute_dtype
from mlxlora_core.machine.memory import free_memory_bytes, require_memory
from mlxlora_core.model.architectures import build, find_architecture, folder_args, placed
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import (
    StackedLinear,
    StoredEmbedding,
    StoredLinear,
    StoredStackedLinear,
    parameters,
    replace,
)
from mlxlora_core.model.quantization import QUANTIZED, read_quantization, restore
from mlxlora_core.model.tokenizers import (
    FILES,
    CheckedTokenizer,
    check_vocabulary,
    open_tokenizer,
    tokenizer_files,
)
from mlxlora_core.model.weights import WEIGHTS, lazy_weights, read_weights, weight_files
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.values import LazyTensor

CONFIG = "config.json"

#: of the free memory, how much the weights may take when they are expanded to float32 on a CPU
EXPANDED_SHARE = 0.5
#: stacks of the four threads that MLX reads files with; where one cannot start, it waits forever
READERS_BYTES = 4 * 2**23
_CONFIG_BYTES = 1 << 20
SMALLER = "use a smaller model, or one that is quantized (mlxlora convert -q)"


@dataclass(frozen=True)
class Model:
    """A model read from its folder.

    Attributes:
        folder: where it was read.
        language_model: with frozen parameters, ready to compute.
        tokenizer: of the model.
        config: config.json.
        quantization: how linears were quantized, or None.
        architecture: who built it.
        fingerprint: of config, tensors and tokenizer, the same for the same base in any format.
        note: how the weights are held, where that makes it slower; else nothing.
    """

    folder: Path
    language_model: LanguageModel
    tokenizer: CheckedTokenizer
    config: Mapping[str, Any]
    quantization: Choice | None
    architecture: Component
    fingerprint: str
    note: str

    @property
    def module(self) -> nn.Module:
        """The language model as the MLX module that it is."""
        return self.language_model

    def sequence_limit(self, max_seq_length: int) -> int:
        """The longest row to train on: ``max_seq_length``, or the model's context if that is less."""
        return min(max_seq_length, self.language_model.context_tokens or max_seq_length)


def load(folder: Path, registry: Registry) -> Model:
    """Read a model folder.

    Raises:
        ModelError: a part is absent, damaged or does not fit the others (all
            tensors that do not fit are listed), or the folder was replaced
            by another one meanwhile.
        ResourceError: it does not fit into memory.
        PluginError: no plugin restores its quantization, or one breaks its contract.
    """
    before = durable.version(folder)
    config = read_config(folder)
    tensors, fingerprint = read_weights(folder)
    note = _too_large_to_expand(tensors)
    model = _assembled(folder, registry, config, tensors, fingerprint, note)
    if note:
        _keep_stored(model.module)
    _fill(model.module, tensors, folder)
    if durable.version(folder) != before:
        raise ModelError("the folder was replaced while it was read", where=folder, fix="try again")
    return model


def outline(folder: Path, registry: Registry) -> tuple[Model, dict[str, LazyTensor]]:
    """A model whose parameters hold nothing yet, and the tensors of its folder, none of which is read.

    Raises:
        ModelError: as :func:`load`.
        PluginError: as :func:`load`.
    """
    config = read_config(folder)
    tensors, fingerprint = lazy_weights(folder)
    empty = {name: mx.zeros(t.shape, getattr(mx, t.dtype)) for name, t in tensors.items()}  # never computed
    model = _assembled(folder, registry, config, empty, fingerprint, "")
    _check_fit(model.module, tensors, folder)
    model.module.freeze()
    model.module.eval()
    return model, tensors


def _assembled(
    folder: Path,
    registry: Registry,
    config: Mapping[str, Any],
    tensors: Mapping[str, mx.array],
    fingerprint: str,
    note: str,
) -> Model:
    """The parts of a model, with a place for each of the ``tensors``."""
    architecture = find_architecture(config, registry, folder / CONFIG)
    args = placed(folder / CONFIG, folder_args, architecture.spec, config)
    language_model = build(architecture, args)
    quantization = read_quantization(config, registry, folder / CONFIG)
    if quantization is not None:
        restore(language_model, tensors, config, quantization, folder / CONFIG)
    tokenizer = open_tokenizer(tokenizer_files(folder, config), registry, folder)
    check_vocabulary(tokenizer, language_model.vocab_size, folder)
    parts = json.dumps([_telling(config), fingerprint, tokenizer.fingerprint], sort_keys=True)
    return Model(
        folder,
        language_model,
        tokenizer,
        config,
        quantization,
        architecture,
        hashlib.sha256(parts.encode()).hexdigest(),
        note,
    )


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config tells of the base that its tensors and its tokenizer do not tell themselves.

    So a checkpoint that is converted again fits the adapters that were made for
    it when config.json did not list files and packed linears yet.
    """
    table = config.get(QUANTIZED)
    silent = {FILES} if not isinstance(table, dict) or any(table.values()) else {FILES, QUANTIZED}
    return {key: value for key, value in config.items() if key not in silent}


def holds_only_a_model(folder: Path) -> bool:
    """Whether everything in ``folder`` is what mlxlora writes into one, by the header of its weights."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        tokenizer = tokenizer_files(folder, read_config(folder))
    except ModelError:  # damaged: it may be replaced where the rest is ours
        tokenizer = tokenizer_files(folder, {})
    weights = [path for name in WEIGHTS.values() if (path := folder / name).exists()]
    written = all(tensor_file.FINGERPRINT in tensor_file.stated(path) for path in weights)
    return written and bool(weights) and hold_only_files(folder, [CONFIG, *tokenizer, *WEIGHTS.values()])


def files(folder: Path) -> list[Path]:
    """The files that make the model.

    Raises:
        ModelError: there is no model, or a shard that its index names is absent.
    """
    tokenizer = tokenizer_files(folder, read_config(folder))
    found = [folder / CONFIG, *tokenizer.values(), *weight_files(folder)]
    absent = [path.name for path in found if not path.is_file()]
    if absent:
        raise ModelError(f"lacks {listing(absent)}", where=folder)
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json.

    Raises:
        ModelError: it is absent or is no JSON object.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ModelError(
            "there is no config.json; this is not a model folder",
            where=folder,
            fix="make one with: mlxlora convert --torch-path DIR --mlx-path " + str(folder),
        )
    config = read_json(path, _CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ModelError(f"wanted a JSON object, got {type(config).__name__}", where=path)
    return config


def _computed(stored: mx.Dtype) -> mx.Dtype:
    """The type in which a stored tensor is held in memory."""
    return compute_dtype(stored) if mx.issubdtype(stored, mx.floating) else stored


def _too_large_to_expand(tensors: Mapping[str, mx.array]) -> str:
    """Why the weights stay in the type that they are stored in, or nothing when they are expanded once.

    A CPU computes in float32. Expanded weights may take :data:`EXPANDED_SHARE`
    of the memory that is free; the rest is for the work.

    Raises:
        ResourceError: not even what is stored fits.
    """
    stored = sum(t.nbytes for t in tensors.values())
    expanded = sum(t.size * _computed(t.dtype).size for t in tensors.values())
    require_memory(stored + READERS_BYTES, "the model", SMALLER)
    free = free_memory_bytes()
    if expanded == stored or free is None or expanded <= EXPANDED_SHARE * free:
        return ""
    return (
        f"the weights are expanded for each product, which is slower: in float32 they take "
        f"{expanded / 1e9:.2f} GB, more than {EXPANDED_SHARE:.0%} of the {free / 1e9:.2f} GB that are free"
    )


def _keep_stored(module: nn.Module) -> None:
    """Let dense linears and embeddings keep their weights as they are stored, and expand them on use."""
    kinds: dict[type, Any] = {
        nn.Linear: StoredLinear,
        nn.Embedding: StoredEmbedding,
        StackedLinear: StoredStackedLinear,
    }
    found = module.named_modules()
    replace(module, {path: kinds[type(child)](child) for path, child in found if type(child) in kinds})


def _check_fit(module: nn.Module, tensors: Mapping[str, Any], folder: Path) -> None:
    faults = mismatches(tensors, parameters(module))
    if faults:
        raise ModelError("the weights do not fit config.json: " + "; ".join(faults), where=folder)


def _fill(module: nn.Module, tensors: dict[str, mx.array], folder: Path) -> None:
    """Give every parameter its tensor, in the type to compute with, and freeze it; empties ``tensors``."""
    _check_fit(module, tensors, folder)
    owners = dict(module.named_modules())
    ready = []
    try:
        for name in list(tensors):
            owner, _, part = name.rpartition(".")
            tensor = _prepared(owners.get(owner), part, tensors[name])
            # One by one: all at once, the weights as they are stored would stand beside the expanded ones.
            mx.eval(tensor)
            ready.append((name, tensor))
            del tensors[name]
    except RuntimeError as fault:
        # Where MLX gets no memory to read into, all it says is that it could not read.
        require_memory(sum(t.nbytes for t in tensors.values()), "the rest of the model", SMALLER)
        raise ModelError(f"the weights cannot be read: {fault}", where=folder) from fault
    module.update(tree_unflatten(ready))
    module.freeze()
    module.eval()


def _prepared(owner: nn.Module | None, part: str, tensor: mx.array) -> mx.array:
    """A parameter of ``owner``, in the type to compute with."""
    if part == "weight" and isinstance(owner, (StoredLinear, StoredStackedLinear, StoredEmbedding)):
        return tensor
    return tensor.astype(_computed(tensor.dtype))
