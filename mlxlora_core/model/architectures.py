"""Finds the architecture of a model, reads its arguments and builds it; checks what the plugin gives."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import ModelError, SafetyError, UsageError, listing
from mlxlora_core.files.lazy_rows import ordered_rows, shifted, some_rows
from mlxlora_core.model.folder import SOURCE
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import linears
from mlxlora_core.model.tokenizers import FILES
from mlxlora_core.options import explain, parse, plain
from mlxlora_core.plugins import Component, Registry
from mlxlora_core.specs import Architecture, Layout
from mlxlora_core.values import ForeignModel, ForeignTensor, LazyTensor

Shapes = Mapping[str, tuple[int, ...]]

# Keys by which other libraries find code to run for a model.
_CODE_KEYS = ("auto_map", "model_file")
# layout -> the key that says which family a model is of
_TYPE_KEYS = {"gguf": "general.architecture"}
# The part of a tensor's name up to the number of its layer.
_LAYER = re.compile(r".*?(?<![^.])[0-9]+\.")
# Keys of config.json that are core's own, whatever the architecture.
_CORE_KEYS = ("model_type", "quantizer", "quantization", "quantized", FILES, SOURCE)


def find_architecture(config: Mapping[str, Any], registry: Registry, where: Path) -> Component:
    """The architecture that builds the ``model_type`` of a model folder's config.

    Raises:
        ModelError: none does, or several do.
        SafetyError: the config asks for code of its own.
    """
    stated = config.get("model_type")
    known = registry.of("architecture")
    return _only([c for c in known if stated in c.spec.model_types], config, registry, where)


def folder_args(spec: Architecture, config: Mapping[str, Any]) -> Any:
    """The arguments that a model folder's config states; null counts as left out.

    Raises:
        ModelError: unknown keys, missing or impossible values, all told at once.
    """
    own = {option.name for option in explain(spec.args)}
    if "hidden_size" in config and "hidden_size" not in own:
        raise ModelError(
            "is the config of a Hugging Face folder (hidden_size), wanted one that mlxlora wrote",
            fix="make a model folder of a checkpoint that a weight loader reads: mlxlora convert",
        )
    apart = {key for key in (*_CORE_KEYS, *_CODE_KEYS) if key not in own}
    return _parsed(spec, {k: v for k, v in config.items() if k not in apart and v is not None})


def read_foreign(foreign: ForeignModel, registry: Registry, where: Path) -> tuple[Component, Any]:
    """The architecture that reads a foreign config, and the arguments that it makes of it.

    Args:
        foreign: what a loader opened.
        registry: where architectures are looked up.
        where: of the checkpoint, for messages.

    Raises:
        ModelError: no architecture knows the config, several do, or values are impossible.
        SafetyError: the config asks for code of its own.
        PluginError: what the architecture gives breaks the contract.
    """
    read = []
    shapes = shapes_of(foreign)
    plain_config = {key: value for key, value in foreign.config.items() if key not in _CODE_KEYS}
    for component in registry.of("architecture"):
        reader = reader_of(component, foreign.layout)
        if reader is None:
            continue
        # A config that asks for code is refused as such below, and not for a key that is not known.
        seen = plain_config if component.plugin.origin == "built-in" else foreign.config
        args = placed(where, foreign_args, reader, seen, shapes)
        if args is not None:
            read.append((component, component.checked("read", args, component.spec.args)))
    found = [component for component, _ in read]
    component = _only(found, foreign.config, registry, where, foreign.layout)
    return component, placed(where, _parsed, component.spec, _stated(read[0][1]))


def shapes_of(foreign: ForeignModel) -> dict[str, tuple[int, ...]]:
    """The shapes of a foreign model's tensors by their names."""
    return {name: tensor.shape for name, tensor in foreign.tensors.items()}


def reader_of(component: Component, layout: str) -> Architecture | Layout | None:
    """What reads a config that is spelt in a layout, or None where the architecture does not know it."""
    spec: Architecture = component.spec
    return spec.layouts.get(layout) if layout else spec


def foreign_notes(component: Component, foreign: ForeignModel) -> list[str]:
    """What the architecture assumed of a foreign config that it has read, in words.

    Raises:
        PluginError: it gives something else.
    """
    reader = reader_of(component, foreign.layout)
    if reader is None or reader.notes is None:
        return []
    return checked_notes(component, "notes", reader.notes(foreign.config, shapes_of(foreign)))


def checked_notes(component: Component, function: str, given: Any) -> list[str]:
    """Sentences that a plugin gives, each a text."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise component.breach(function, f"notes of type {type(given).__name__}", "a sequence of texts")
    return [component.checked(function, note, str) for note in given]


def foreign_args(reader: Architecture | Layout, config: Mapping[str, Any], shapes: Shapes) -> Any:
    """What ``read`` of an architecture, or of a layout of it, makes of a config.

    Its complaints are about the model.
    """
    try:
        return reader.read(config, shapes)
    except UsageError as fault:
        raise ModelError(fault.what, where=fault.where, fix=fault.fix) from fault


def model_config(component: Component, args: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds of a model whose foreign config was ``config``."""
    types = component.spec.model_types
    stated = config.get("model_type")
    return {"model_type": stated if stated in types else types[0]} | _stated(args)


def model_tensors(
    component: Component, foreign: ForeignModel, args: Any, wanted: Mapping[str, mx.array]
) -> Mapping[str, LazyTensor]:
    """The tensors of the model, made of those that were found; nothing is read.

    Args:
        component: the architecture.
        foreign: what was found.
        args: of the model.
        wanted: its parameters by name, of which only the shapes count.

    Raises:
        ModelError: a tensor is absent, or lacks rows.
        PluginError: the architecture gives something else.
    """
    if foreign.layout:
        return _by_table(component, foreign, args, wanted)
    tensors: Any = component.spec.tensors(foreign.tensors, args)
    if not isinstance(tensors, Mapping):
        raise component.breach("tensors", type(tensors).__name__, "a mapping of names to tensors")
    for name, tensor in tensors.items():
        component.checked("tensors", name, str)
        component.checked("tensors", tensor, LazyTensor)
    return tensors


def foreign_table(component: Component, layout: str, args: Any) -> Sequence[ForeignTensor]:
    """How each parameter of a model of ``args`` is stored in a layout that the architecture knows.

    Raises:
        PluginError: the architecture gives something else.
    """
    given: Any = component.spec.layouts[layout].table(args)
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise component.breach("table", type(given).__name__, "a sequence of foreign tensors")
    return [component.checked("table", entry, ForeignTensor) for entry in given]


def _by_table(
    component: Component, foreign: ForeignModel, args: Any, wanted: Mapping[str, mx.array]
) -> dict[str, LazyTensor]:
    """The parameters that a layout's table names, in the order in which the tensors are read cheapest."""
    table = foreign_table(component, foreign.layout, args)
    absent = sorted({entry.foreign for entry in table} - foreign.tensors.keys())
    if absent:
        known = {entry.foreign for entry in table}
        other = sorted(foreign.tensors.keys() - known)
        there = f"; nobody knows {listing(other, 4)}" if other else ""
        raise ModelError(f"{len(absent)} tensors are missing: {listing(absent)}{there}")
    _refuse_more(foreign.tensors.keys(), {entry.foreign for entry in table})
    places = {name: place for place, name in enumerate(foreign.tensors)}
    tensors = {}
    for entry in sorted(table, key=lambda entry: places[entry.foreign]):
        if entry.name not in wanted:
            raise component.breach("table", f"parameter {entry.name}", "one that the model has")
        tensor = foreign.tensors[entry.foreign]
        if entry.start is not None:
            count = wanted[entry.name].shape[0]
            if entry.start + count > tensor.shape[0]:
                rows = f"{entry.foreign} has {tensor.shape[0]} rows"
                raise ModelError(f"{rows}, {entry.name} is rows {entry.start} to {entry.start + count} of it")
            tensor = some_rows(tensor, entry.start, count)
        if entry.rows is not None:
            if len(entry.rows) != tensor.shape[0]:
                raise ModelError(f"{entry.foreign} has {tensor.shape[0]} rows, wanted {len(entry.rows)}")
            tensor = ordered_rows(tensor, entry.rows)
        tensors[entry.name] = shifted(tensor, entry.shift) if entry.shift else tensor
    return tensors


def _refuse_more(found: Collection[str], known: Collection[str]) -> None:
    """Refuse tensors beside those of a layer, of the head or of a norm that the config does not tell of.

    A model is another one without the biases and norms that it was trained with. What stands elsewhere, as
    the head of a classifier does, is left out and told.

    Raises:
        ModelError: with their names.
    """
    layers = {place[0] for name in known if (place := _LAYER.match(name))}
    linears = {name.rpartition(".")[0] for name in known}
    more = sorted(
        name
        for name in set(found) - set(known)
        if name.rpartition(".")[0] in linears or ((place := _LAYER.match(name)) and place[0] in layers)
    )
    if more:
        raise ModelError(
            f"{len(more)} tensors have no place in the model that the config states: {listing(more, 4)}",
            fix="check the config: it may lack a key, such as attention_bias, or state another model_type",
        )


def build(component: Component, args: Any) -> LanguageModel:
    """The model of checked arguments, its parameters still to be loaded.

    Raises:
        PluginError: what is built lacks a member of a language model.
    """
    model = component.checked("build", component.spec.build(args), LanguageModel)
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers or not all(isinstance(x, nn.Module) for x in layers):
        raise component.breach("build", f"layers of type {type(layers).__name__}", "a list of modules")
    for name in ("vocab_size", "context_tokens", "heads"):
        size = getattr(model, name, "")
        untold = name != "vocab_size" and size is None
        if not untold and (type(size) is not int or size < 1):
            raise component.breach("build", f"{name} {size!r}", "a whole number above 0")
    head = getattr(model, "head_path", None)
    if not isinstance(head, str) or (head and head not in dict(linears(model))):
        raise component.breach("build", f"head_path {head!r}", "the path of a linear, or nothing")
    return model


def _parsed(spec: Architecture, values: Mapping[str, Any]) -> Any:
    """Arguments out of plain values, none of them impossible."""
    try:
        return parse(spec.args, values, owner=f"architecture '{spec.name}'", spell=str, strict=True)
    except UsageError as fault:
        raise ModelError(fault.what) from fault


def _stated(args: Any) -> dict[str, Any]:
    """Arguments as config.json holds them, without those that are None."""
    return {key: value for key, value in plain(args).items() if value is not None}


def placed(where: Path, function: Any, *arguments: Any) -> Any:
    """What ``function`` gives; its errors get their place."""
    try:
        return function(*arguments)
    except ModelError as fault:
        raise ModelError(fault.what, where=fault.where or where, fix=fault.fix) from fault


def _only(
    found: list[Component], config: Mapping[str, Any], registry: Registry, where: Path, layout: str = ""
) -> Component:
    """The one architecture of those that were found."""
    if len(found) == 1:
        if not layout:  # elsewhere such keys are for a library that the built-in family has no need of
            _refuse_code(config, found[0], where)
        return found[0]
    if found:
        raise ModelError(f"several architectures build this: {listing(c.id for c in found)}", where=where)
    readers = [reader for c in registry.of("architecture") if (reader := reader_of(c, layout)) is not None]
    known = listing(sorted({name for reader in readers for name in reader.model_types}), 40)
    failed = "".join(f"; plugin {p} failed to load: {p.reason}" for p in registry.failed)
    stated = config.get(_TYPE_KEYS.get(layout, "model_type"))
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
