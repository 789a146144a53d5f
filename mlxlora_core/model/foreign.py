"""``loader.open -> architecture.tensors``: a foreign model as one of mlxlora's, its tensors still unread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files.input_file import is_plain_name
from mlxlora_core.files.tensor_checks import mismatches
from mlxlora_core.model import architectures
from mlxlora_core.model.architectures import placed
from mlxlora_core.model.folder import CONFIG
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import parameters
from mlxlora_core.model.strangers import known_as
from mlxlora_core.model.tokenizers import FILES, CheckedTokenizer, check_vocabulary, open_tokenizer
from mlxlora_core.model.weights import WEIGHTS
from mlxlora_core.plugins import Component, Registry
from mlxlora_core.values import ForeignModel, LazyTensor


@dataclass(frozen=True)
class OpenedModel:
    """A foreign model whose parts fit each other.

    Attributes:
        loader: who read it.
        architecture: who builds it.
        model: built, its parameters still to be loaded.
        tensors: for each parameter of the model the tensor to load.
        tokenizer: of the model.
        config: what config.json will hold.
        unread: tensors of the checkpoint that nobody has read so far; what is
            left when all of ``tensors`` are read has no use here.
        notes: what the loader and the architecture did or assumed that its owner may not expect.
    """

    loader: Component
    architecture: Component
    model: LanguageModel
    tensors: Mapping[str, LazyTensor]
    tokenizer: CheckedTokenizer
    config: dict[str, Any]
    unread: Collection[str]
    notes: Sequence[str]


def open_foreign(source: Path, registry: Registry, loader: str | None, options: Any) -> OpenedModel:
    """Open a foreign model; nothing of its tensors is read.

    Args:
        source: folder or file.
        registry: where loaders, architectures and tokenizers are looked up.
        loader: which weight loader; None asks each whether it knows the path.
        options: of the loader; None for its defaults.

    Raises:
        ModelError: a part is absent or damaged, or tensors do not fit (all listed).
        SafetyError: a file wants to run code.
        PluginError: what a plugin gives breaks its contract.
    """
    reader = find_loader(source, registry, loader)
    foreign = _checked(reader, reader.spec.open(source, options or reader.spec.options()))
    architecture, args = architectures.read_foreign(foreign, registry, source)
    found, unread = _watched(reader, foreign.tensors)
    model = architectures.build(architecture, args)
    wanted = parameters(model)
    watched = replace(foreign, tensors=found)
    tensors = placed(source, architectures.model_tensors, architecture, watched, args, wanted)
    faults = mismatches(tensors, wanted)
    if faults:
        raise ModelError("the tensors do not fit the config: " + "; ".join(faults), where=source)
    tokenizer = open_tokenizer(foreign.tokenizer, registry, source)
    check_vocabulary(tokenizer, model.vocab_size, source)
    read = partial(_read, architecture, "tensors")
    tensors = {name: _reading(name, tensor, read) for name, tensor in tensors.items()}
    config = architectures.model_config(architecture, args, foreign.config)
    config[FILES] = list(tokenizer.files)
    notes = [*foreign.notes, *architectures.foreign_notes(architecture, foreign)]
    return OpenedModel(reader, architecture, model, tensors, tokenizer, config, unread, notes)


def find_loader(source: Path, registry: Registry, name: str | None) -> Component:
    """The loader asked for, or the only one that knows the path.

    Raises:
        ModelError: nothing is there, or no loader or several know it.
    """
    if not source.exists():
        raise ModelError(
            "there is no such folder or file", where=source, fix="name the checkpoint's folder or file"
        )
    if name is not None:
        return registry.find("loader", name)
    loaders = registry.of("loader")
    found = [component for component in loaders if component.spec.detect(source)]
    if len(found) == 1:
        return found[0]
    what = "folder" if source.is_dir() else "file"
    if found:
        ids = [component.id for component in found]
        raise ModelError(f"{listing(ids)} can read this {what}", where=source, fix=f"add --loader {ids[0]}")
    failed = "".join(f"; plugin {p} failed to load: {p.reason}" for p in registry.failed)
    known = known_as(source)
    what += f", which is {known}" if known else ""
    raise ModelError(
        f"no weight loader knows this {what} (there is {listing(c.spec.name for c in loaders)}{failed})",
        where=source,
    )


def _checked(reader: Component, given: Any) -> ForeignModel:
    """What a loader has opened, held against the contract."""
    opened = reader.checked("open", given, ForeignModel)
    for name in ("config", "tokenizer", "tensors"):
        part = getattr(opened, name)
        if not isinstance(part, Mapping):
            raise reader.breach("open", f"{name} of type {type(part).__name__}", "a mapping")
    for name, tensor in opened.tensors.items():
        reader.checked("open", name, str)
        reader.checked("open", tensor, LazyTensor)
    architectures.checked_notes(reader, "open", opened.notes)
    reader.checked("open", opened.layout, str)
    taken = {CONFIG, *WEIGHTS.values()}
    for name, file in opened.tokenizer.items():
        if not is_plain_name(name) or name in taken:
            raise reader.breach("open", f"a tokenizer file {name!r}", "a plain file name of its own")
        if not isinstance(file, (Path, bytes)):
            raise reader.breach("open", f"{name} of type {type(file).__name__}", "a path, or contents")
    return opened


def _read(owner: Component, function: str, name: str, tensor: LazyTensor) -> mx.array:
    """What a tensor reads, which must be what ``owner`` has told of it."""
    value: Any = tensor.read()
    if not isinstance(value, mx.array):
        raise owner.breach(function, f"{name} that reads {type(value).__name__}", "mlx.core.array")
    if value.shape != tuple(tensor.shape):
        raise owner.breach(function, f"{name} that reads {value.shape}", f"{tuple(tensor.shape)}, as told")
    return value


def _reading(name: str, tensor: LazyTensor, read: Callable[[str, LazyTensor], mx.array]) -> LazyTensor:
    """The tensor, and the parts that it is packed in, as ``read`` reads them."""
    packed = tensor.packed
    if packed is not None:
        path = name.removesuffix(".weight")
        parts = {part: _reading(f"{path}.{part}", t, read) for part, t in packed.parts.items()}
        packed = replace(packed, parts=parts)
    return replace(tensor, read=partial(read, name, tensor), packed=packed)


def _watched(
    reader: Component, found: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], dict[str, None]]:
    """The same tensors, and the names of those that nobody has read so far."""
    unread = dict.fromkeys(found)

    def watched(whole: str, name: str, tensor: LazyTensor) -> mx.array:
        unread.pop(whole, None)
        return _read(reader, "open", name, tensor)

    return {name: _reading(name, tensor, partial(watched, name)) for name, tensor in found.items()}, unread
