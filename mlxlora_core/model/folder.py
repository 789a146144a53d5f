"""The model folder: config.json, the weights and the tokenizer, read whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxlora_core.errors import ModelError, SafetyError, listing
from mlxlora_core.files import durable, tensor_file
from mlxlora_core.files.input_file import read_json
from mlxlora_core.machine.device import compute_dtype
from mlxlora_core.machine.memory import free_memory_bytes, require_memory
from mlxlora_core.model.linears import (
    StackedLinear,
    StoredEmbedding,
    StoredLinear,
    StoredStackedLinear,
    parameters,
    replace,
)
from mlxlora_core.model.quantization import read_quantization, restore
from mlxlora_core.model.tokenizer import Tokenizer
from mlxlora_core.model.weights import WEIGHTS, read_weights, weight_files
from mlxlora_core.registry import Choice, Component, Registry
from mlxlora_core.specs import LanguageModel

CONFIG = "config.json"
TOKENIZER = "tokenizer.model"

#: of the free memory, how much the weights may take when they are expanded to float32 on a CPU
EXPANDED_SHARE = 0.5
#: stacks of the four threads that MLX reads files with; where one cannot start, it waits forever
READERS_BYTES = 4 * 2**23
_CONFIG_BYTES = 1 << 20
SMALLER = "use a smaller model, or one that is quantized (mlxlora convert -q)"

# Keys by which other libraries find code to run for a model.
_CODE_KEYS = ("auto_map", "model_file")


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
    tokenizer: Tokenizer
    config: Mapping[str, Any]
    quantization: Choice | None
    architecture: Component
    fingerprint: str
    note: str

    @property
    def module(self) -> nn.Module:
        """The language model as the MLX module that it is."""
        return cast(nn.Module, self.language_model)

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
        PluginError: no plugin builds its model_type or restores its quantization.
    """
    before = durable.version(folder)
    config = read_config(folder)
    architecture = find_architecture(config, registry, folder / CONFIG)
    args = model_args(architecture, config, {}, folder / CONFIG)
    language_model: Any = architecture.checked("build", architecture.spec.build(args), nn.Module)
    tensors, fingerprint = read_weights(folder)
    quantization = read_quantization(config, registry, folder / CONFIG)
    note = _too_large_to_expand(tensors)
    module: Any = language_model
    if quantization is not None:
        restore(module, tensors, config, quantization, folder / CONFIG)
    if note:
        _keep_stored(module)
    _fill(module, tensors, folder)
    tokenizer = Tokenizer(folder / TOKENIZER)
    check_vocabulary(tokenizer, language_model.vocab_size)
    if durable.version(folder) != before:
        raise ModelError("the folder was replaced while it was read", where=folder, fix="try again")
    parts = json.dumps([config, fingerprint, tokenizer.fingerprint], sort_keys=True)
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


def holds_only_a_model(folder: Path) -> bool:
    """Whether everything in ``folder`` is what mlxlora writes into a model folder."""
    names = {path.name for path in folder.iterdir()}
    return CONFIG in names and names <= {CONFIG, TOKENIZER, *WEIGHTS.values()}


def files(folder: Path) -> list[Path]:
    """The files that make the model.

    Raises:
        ModelError: there is no model, or a shard that its index names is absent.
    """
    read_config(folder)
    found = [folder / CONFIG, folder / TOKENIZER, *weight_files(folder)]
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


def model_args(
    architecture: Component, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path
) -> Any:
    """The model arguments that an architecture makes of a config; its errors get their place.

    Raises:
        ModelError: impossible values.
    """
    try:
        return architecture.spec.config(config, shapes)
    except ModelError as fault:
        raise ModelError(fault.what, where=fault.where or where, fix=fault.fix) from fault


def find_architecture(config: Mapping[str, Any], registry: Registry, where: Path) -> Component:
    """The architecture that builds a config's ``model_type``, stated or recognised.

    Raises:
        ModelError: none does, or several do.
    """
    components = registry.of("architecture")
    stated = config.get("model_type")
    found = [
        c
        for c in components
        if (stated in c.spec.model_types if stated is not None else c.spec.detect(config) is not None)
    ]
    if len(found) == 1:
        _refuse_code(config, found[0], where)
        return found[0]
    known = listing(sorted({name for c in components for name in c.spec.model_types}))
    if found:
        raise ModelError(f"several architectures build this: {listing(c.id for c in found)}", where=where)
    failed = "".join(f"; plugin {p} failed to load: {p.reason}" for p in registry.failed)
    what = (
        f"model_type '{stated}' is not known"
        if stated is not None
        else "no model_type is stated or recognised"
    )
    raise ModelError(f"{what} (there is {known}{failed})", where=where, fix="install a plugin that builds it")


def _refuse_code(config: Mapping[str, Any], architecture: Component, where: Path) -> None:
    """Refuse a config that names code of its own, unless a plugin that was installed builds that model."""
    asked = [key for key in _CODE_KEYS if config.get(key)]
    if asked and architecture.plugin.origin == "built-in":
        raise SafetyError(
            f"asks for code of its own ({listing(asked)}), which is never run",
            where=where,
            fix="install a plugin that builds this model, or take the key out if it is a plain "
            + str(architecture.spec.name),
        )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer of another vocabulary.

    Raises:
        ModelError: with both sizes.
    """
    if tokenizer.vocab_size != vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model a vocabulary of {vocab_size}",
            where=tokenizer.path,
            fix="use the tokenizer that the model was trained with",
        )


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


def _fill(module: nn.Module, tensors: dict[str, mx.array], folder: Path) -> None:
    """Give every parameter its tensor, in the type to compute with, and freeze it; empties ``tensors``."""
    faults = tensor_file.mismatches(tensors, parameters(module))
    if faults:
        raise ModelError("the weights do not fit config.json: " + "; ".join(faults), where=folder)
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
