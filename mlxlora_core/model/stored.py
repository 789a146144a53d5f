"""A model whose tensors are still unread: a model folder, or anything that a weight loader opens.

``path -> StoredModel``. :mod:`mlxlora_core.model.loading` reads all of its tensors into a model;
converting, fusing and exporting take them one by one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files.fingerprints import combine
from mlxlora_core.files.tensor_checks import mismatches
from mlxlora_core.files.tensor_file import tensor_digest
from mlxlora_core.model.architectures import build, find_architecture, folder_args, placed
from mlxlora_core.model.casting import DTYPES, STORED, cast_on_reading
from mlxlora_core.model.folder import CONFIG, SOURCE, is_model_folder, read_config
from mlxlora_core.model.foreign import OpenedModel, open_foreign
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import parameters
from mlxlora_core.model.quantization import (
    QUANTIZED,
    packed_already,
    packed_config,
    read_quantization,
    restore,
)
from mlxlora_core.model.quantizing import Packing, pack_on_reading
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
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.values import LazyTensor, PackedTensor


@dataclass(frozen=True)
class StoredModel:
    """A model with empty parameters, and the tensors to fill them with.

    Attributes:
        path: the folder or file.
        where: the file that says how it is quantized, for messages.
        language_model: with empty parameters; quantized ones where weights are packed.
        tokenizer: of the model.
        config: config.json of its model folder, or what that would hold.
        architecture: the plugin component that built it.
        tensors: every parameter as a model folder holds it, still unread.
        digests: name -> digest of each tensor; None if tensors must be read to compute them.
        notes: what was assumed about another library's model, or changed in it.
        quantization: how its linears are quantized, or None.
        packing: what is quantized as the tensors are read, or None.
        loader: the plugin component that opened it, or None for a model folder.
        unread: tensors of another library's model that have not been read; those that remain when all
            of ``tensors`` are read are not part of the model.
    """

    path: Path
    where: Path
    language_model: LanguageModel
    tokenizer: CheckedTokenizer
    config: Mapping[str, Any]
    architecture: Component
    tensors: dict[str, LazyTensor]
    digests: Mapping[str, str] | None
    notes: tuple[str, ...] = ()
    quantization: Choice | None = None
    packing: Packing | None = None
    loader: Component | None = None
    unread: Collection[str] = ()

    @property
    def module(self) -> nn.Module:
        """The language model, typed as an MLX module."""
        return self.language_model

    def fingerprint(self, digests: Mapping[str, str] | None = None) -> str:
        """Of config, tensors and tokenizer: the same for the same base in any format.

        Args:
            digests: of all tensors, if the caller has read them; otherwise they are read here.
        """
        known = digests or self.digests or {n: tensor_digest(n, t.read()) for n, t in self.tensors.items()}
        parts = [_telling(self.config), combine(known), self.tokenizer.fingerprint]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_stored(
    path: Path, registry: Registry, *, whole: bool = False, quantization: Quantization | None = None
) -> StoredModel:
    """Open a model folder, or a model of another tool that a weight loader knows.

    Args:
        path: folder or file.
        registry: where plugins are looked up.
        whole: whether the caller will read and keep all tensors; those of a model folder are then read
            from one open file, which the result holds.
        quantization: how to quantize dense linears as they are read, to the same bits as converting
            does; None to take the weights as they are.

    Raises:
        UsageError: there is nothing to quantize, or the quantizer takes none of it.
        ModelError: a part is absent, damaged or does not fit the others (all
            tensors that do not fit are listed).
        SafetyError: a file wants to run code, or leads out of its folder.
        ResourceError: it does not fit into memory.
        PluginError: no plugin restores its quantization, or one breaks its contract.
    """
    if is_foreign(path, registry):
        found = _foreign(path, registry)
    else:
        found = _own(path, registry, whole=whole and quantization is None)
    if quantization is not None:
        found = _remade(found, None, quantization, registry)
    return _restored(found, registry)


def open_to_convert(
    path: Path,
    registry: Registry,
    *,
    loader: str | None = None,
    loader_options: Any = None,
    dtype: str | None = None,
    quantization: Quantization | None = None,
) -> StoredModel:
    """Open a model to convert it: its tensors are read once, in the types that the new folder will hold.

    A model folder is only accepted if there is something to change about it.

    Args:
        path: folder or file.
        registry: where plugins are looked up.
        loader: the weight loader to use; None asks each whether it knows the path.
        loader_options: of the loader; None for its defaults.
        dtype: a type, or ``stored`` to keep the type of each tensor; None for the default of the loader.
        quantization: how to quantize the linears, or None.

    Raises:
        MlxloraError: as :func:`open_stored`.
    """
    known = loader is not None or any(component.spec.detect(path) for component in registry.of("loader"))
    idle = quantization is None and dtype is None
    if known or idle or not (path / CONFIG).is_file() or not is_model_folder(path):
        found = _foreign(path, registry, loader, loader_options)
    else:
        found = _own(path, registry)
    return _restored(_remade(found, dtype, quantization, registry), registry)


def is_foreign(path: Path, registry: Registry) -> bool:
    """Whether a path holds another tool's model rather than a model folder.

    A path that holds neither counts as a model folder, whose reader says what is missing.
    """
    if path.is_file():
        return True
    if (path / CONFIG).is_file():
        return bool(known_as(path)) and not is_model_folder(path)
    return any(component.spec.detect(path) for component in registry.of("loader"))


def _own(path: Path, registry: Registry, *, whole: bool = False) -> StoredModel:
    """A model folder, in which packed weights have no quantized modules yet."""
    config = read_config(path)
    tensors, digests = (read_weights if whole else lazy_weights)(path)
    architecture = find_architecture(config, registry, path / CONFIG)
    args = placed(path / CONFIG, folder_args, architecture.spec, config)
    language_model = build(architecture, args)
    tokenizer = open_tokenizer(tokenizer_files(path, config), registry, path)
    check_vocabulary(tokenizer, language_model.vocab_size, path)
    return StoredModel(path, path / CONFIG, language_model, tokenizer, config, architecture, tensors, digests)


def _foreign(path: Path, registry: Registry, loader: str | None = None, options: Any = None) -> StoredModel:
    """What a weight loader opens, in the form of a model folder; see :func:`_own`."""
    opened = open_foreign(path, registry, loader, options)
    config, tensors = folder_form(opened)
    return StoredModel(
        path,
        path,
        opened.model,
        opened.tokenizer,
        config,
        opened.architecture,
        tensors,
        None,
        tuple(opened.notes),
        loader=opened.loader,
        unread=opened.unread,
    )


def _remade(
    found: StoredModel, dtype: str | None, quantization: Quantization | None, registry: Registry
) -> StoredModel:
    """The model with its tensors cast, and quantized if asked for, as they are read."""
    if dtype is None:
        dtype = _told_dtype(found.loader) if found.loader is not None else STORED
    read_quantization(found.config, registry, found.where)  # refuses a config in another form
    known = packed_already(found.module, found.tensors, found.config, found.where)
    parts = {name for name in found.tensors if is_part(name, known)}
    tensors = cast_on_reading(found.tensors, dtype, parts, found.path)
    if quantization is None:
        return replace(found, tensors=tensors, digests=None)
    model, config = found.language_model, found.config
    packing = pack_on_reading(model, tensors, config, quantization, registry, found.path)
    return replace(found, tensors=packing.tensors, config=packing.config, digests=None, packing=packing)


def _told_dtype(loader: Component) -> str:
    """The type to which a loader wants its checkpoints converted."""
    told: str = loader.spec.dtype
    if told not in (STORED, *DTYPES):
        raise loader.breach("dtype", repr(told), listing((STORED, *DTYPES)))
    return told


def is_part(name: str, packed: Collection[str]) -> bool:
    """Whether a tensor is a part of a packed weight, and not the bias beside it."""
    path, _, part = name.rpartition(".")
    return path in packed and part != "bias"


def folder_form(opened: OpenedModel) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """config.json and the tensors of a model folder of an opened model, with packed weights as their parts.

    Raises:
        ModelError: several quantizers have packed weights.
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
    """What config.json says about weights that the checkpoint has packed."""
    if not packed:
        return {}
    names = {weight.quantizer for weight in packed.values()}
    if len(names) > 1:
        raise ModelError(f"weights are packed in several ways: {listing(sorted(names))}")
    return packed_config(names.pop(), {path: weight.options for path, weight in packed.items()})


def _restored(found: StoredModel, registry: Registry) -> StoredModel:
    """The model with quantized modules for its packed weights; all tensors then fit."""
    module, config, where = found.module, found.config, found.where
    quantization = read_quantization(config, registry, where)
    if quantization is not None:
        # Never computed: only their shapes and types are used.
        empty = {name: mx.zeros(t.shape, getattr(mx, t.dtype)) for name, t in found.tensors.items()}
        restore(module, empty, config, quantization, where)
    _check_fit(module, found.tensors, where)
    module.freeze()
    module.eval()
    return replace(found, quantization=quantization)


def _check_fit(module: nn.Module, tensors: Mapping[str, LazyTensor], where: Path) -> None:
    """Refuse a tensor without a parameter, or a parameter without a tensor."""
    faults = mismatches(tensors, parameters(module))
    if faults:
        raise ModelError("the weights do not fit config.json: " + "; ".join(faults), where=where)


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that enters the fingerprint: what tensors and tokenizer do not say themselves.

    Older versions listed neither files nor packed linears in config.json. Leaving these out lets
    adapters made then fit a checkpoint that is converted again.
    """
    table = config.get(QUANTIZED)
    silent = {FILES, SOURCE}
    silent |= set() if not isinstance(table, dict) or any(table.values()) else {QUANTIZED}
    return {key: value for key, value in config.items() if key not in silent}


def bytes_of(tensor: LazyTensor) -> int:
    """The size of a tensor in a file."""
    size: int = getattr(mx, tensor.dtype).size
    return size * math.prod(tensor.shape)
