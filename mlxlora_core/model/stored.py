"""A model as files hold it, its parameters still unread: a model folder, or whatever a weight loader opens.

``path -> StoredModel``; :mod:`mlxlora_core.model.folder` fills it, fusing and
exporting take its tensors one by one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files.fingerprints import combine
from mlxlora_core.files.tensor_checks import mismatches
from mlxlora_core.files.tensor_file import tensor_digest
from mlxlora_core.model.architectures import build, find_architecture, folder_args, placed
from mlxlora_core.model.folder import CONFIG, SOURCE, is_model_folder, read_config
from mlxlora_core.model.foreign import OpenedModel, open_foreign
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import parameters
from mlxlora_core.model.quantization import QUANTIZATION, QUANTIZED, QUANTIZER, read_quantization, restore
from mlxlora_core.model.strangers import known_as
from mlxlora_core.model.tokenizers import (
    FILES,
    CheckedTokenizer,
    check_vocabulary,
    open_tokenizer,
    tokenizer_files,
)
from mlxlora_core.model.weights import lazy_weights, read_weights
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.values import LazyTensor, PackedTensor


@dataclass(frozen=True)
class StoredModel:
    """A model whose parameters hold nothing yet.

    Attributes:
        path: the folder or file.
        language_model: with places for the parameters, quantized ones where weights are packed.
        tokenizer: of the model.
        config: config.json of its model folder, or what that would hold.
        quantization: how linears were quantized, or None.
        architecture: who built it.
        tensors: every parameter, as a model folder holds it, still to be read.
        digests: name -> digest of each tensor, or None where the tensors must be read for them.
        notes: what was assumed of another library's model, or done to it.
    """

    path: Path
    language_model: LanguageModel
    tokenizer: CheckedTokenizer
    config: Mapping[str, Any]
    quantization: Choice | None
    architecture: Component
    tensors: dict[str, LazyTensor]
    digests: Mapping[str, str] | None
    notes: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The language model as the MLX module that it is."""
        return self.language_model

    def fingerprint(self, digests: Mapping[str, str] | None = None) -> str:
        """Of config, tensors and tokenizer: the same for the same base in any format.

        Args:
            digests: those of all tensors, where the caller has read them; else they are read for it.
        """
        known = digests or self.digests or {n: tensor_digest(n, t.read()) for n, t in self.tensors.items()}
        parts = [_telling(self.config), combine(known), self.tokenizer.fingerprint]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_stored(path: Path, registry: Registry, *, whole: bool = False) -> StoredModel:
    """Open a model folder, or a model of another tool that a weight loader knows.

    Args:
        path: folder or file.
        registry: where plugins are looked up.
        whole: whether all tensors will be read, and kept: those of a model folder are then
            read from one open file, and held by what is returned.

    Raises:
        ModelError: a part is absent, damaged or does not fit the others (all
            tensors that do not fit are listed).
        SafetyError: a file wants to run code, or leads out of its folder.
        ResourceError: it does not fit into memory.
        PluginError: no plugin restores its quantization, or one breaks its contract.
    """
    if is_foreign(path, registry):
        return _foreign(path, registry)
    config = read_config(path)
    tensors, digests = (read_weights if whole else lazy_weights)(path)
    architecture = find_architecture(config, registry, path / CONFIG)
    args = placed(path / CONFIG, folder_args, architecture.spec, config)
    language_model = build(architecture, args)
    quantization = _restored(language_model, tensors, config, registry, path / CONFIG)
    tokenizer = open_tokenizer(tokenizer_files(path, config), registry, path)
    check_vocabulary(tokenizer, language_model.vocab_size, path)
    return StoredModel(path, language_model, tokenizer, config, quantization, architecture, tensors, digests)


def is_foreign(path: Path, registry: Registry) -> bool:
    """Whether a path is that of another tool's model, and not of a model folder.

    What is neither counts as a model folder, whose reader says what it lacks.
    """
    if path.is_file():
        return True
    if (path / CONFIG).is_file():
        return bool(known_as(path)) and not is_model_folder(path)
    return any(component.spec.detect(path) for component in registry.of("loader"))


def _foreign(path: Path, registry: Registry) -> StoredModel:
    """A model that a weight loader opens, as the model folder would be that is made of it."""
    opened = open_foreign(path, registry, None, None)
    config, tensors = folder_form(opened)
    quantization = _restored(opened.model, tensors, config, registry, path)
    return StoredModel(
        path,
        opened.model,
        opened.tokenizer,
        config,
        quantization,
        opened.architecture,
        tensors,
        None,
        tuple(opened.notes),
    )


def folder_form(opened: OpenedModel) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """What config.json and the weight file hold of a model that was opened: packed weights by their parts.

    Raises:
        ModelError: weights that two quantizers have packed.
    """
    packed = {
        name.removesuffix(".weight"): tensor.packed
        for name, tensor in opened.tensors.items()
        if tensor.packed is not None
    }
    tensors = {name: tensor for name, tensor in opened.tensors.items() if tensor.packed is None}
    for path, weight in packed.items():
        tensors |= {f"{path}.{part}": tensor for part, tensor in weight.parts.items()}
    return opened.config | _packed_config(packed), tensors


def _packed_config(packed: Mapping[str, PackedTensor]) -> dict[str, Any]:
    """What config.json holds of packed weights: the commonest options, and of each what differs from them."""
    if not packed:
        return {}
    names = {weight.quantizer for weight in packed.values()}
    if len(names) > 1:
        raise ModelError(f"weights are packed in several ways: {listing(sorted(names))}")
    counts = Counter(json.dumps(dict(weight.options), sort_keys=True) for weight in packed.values())
    common = json.loads(counts.most_common(1)[0][0])
    differing = {
        path: {key: value for key, value in weight.options.items() if common.get(key) != value}
        for path, weight in packed.items()
    }
    return {QUANTIZER: names.pop(), QUANTIZATION: common, QUANTIZED: differing}


def _restored(
    language_model: LanguageModel,
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    registry: Registry,
    where: Path,
) -> Choice | None:
    """How the model is quantized, once the packed weights have their places in it, and all tensors fit."""
    module: nn.Module = language_model
    quantization = read_quantization(config, registry, where)
    if quantization is not None:
        # Never computed: only their shapes and types are asked for.
        empty = {name: mx.zeros(t.shape, getattr(mx, t.dtype)) for name, t in tensors.items()}
        restore(module, empty, config, quantization, where)
    _check_fit(module, tensors, where)
    module.freeze()
    module.eval()
    return quantization


def _check_fit(module: nn.Module, tensors: Mapping[str, LazyTensor], where: Path) -> None:
    """Refuse tensors of which one has no place, or a place without one."""
    faults = mismatches(tensors, parameters(module))
    if faults:
        raise ModelError("the weights do not fit config.json: " + "; ".join(faults), where=where)


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config tells of the base that its tensors and its tokenizer do not tell themselves.

    So a checkpoint that is converted again fits the adapters that were made for
    it when config.json did not list files and packed linears yet.
    """
    table = config.get(QUANTIZED)
    silent = {FILES, SOURCE}
    silent |= set() if not isinstance(table, dict) or any(table.values()) else {QUANTIZED}
    return {key: value for key, value in config.items() if key not in silent}


def bytes_of(tensor: LazyTensor) -> int:
    """What a tensor takes in a file."""
    size: int = getattr(mx, tensor.dtype).size
    return size * math.prod(tensor.shape)
