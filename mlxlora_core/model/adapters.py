"""Put an adapter on a model; keep it in a file that fits only the base it was made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core import __version__
from mlxlora_core.errors import DivergedError, ModelError, PluginError, UsageError, listing, nearest
from mlxlora_core.files import tensor_file
from mlxlora_core.model.folder import Model
from mlxlora_core.model.linears import linear_shape, linears, parameters, replace
from mlxlora_core.options import parse, plain
from mlxlora_core.registry import Component, Registry
from mlxlora_core.specs import AdapterOptions

ALL_LINEAR = "all-linear"
METADATA = "mlxlora"


@dataclass(frozen=True)
class Adapted:
    """An adapter that is on a model.

    Attributes:
        component: which adapter.
        options: with which options.
        paths: the linears that it wraps.
    """

    component: Component
    options: AdapterOptions
    paths: tuple[str, ...]


def attach(model: Model, component: Component, options: AdapterOptions, seed: int) -> Adapted:
    """Wrap the linears that ``options`` choose; everything else is frozen.

    Args:
        model: changed in place.
        component: the adapter.
        options: of the adapter.
        seed: of its initial values.

    Raises:
        UsageError: a target that matches nothing, with the names that exist.
        PluginError: the adapter gives no modules, or none that trains.
    """
    mx.random.seed(seed)
    chosen = _choose(model, options)
    model.module.freeze()
    wrapped = {
        path: component.checked("wrap", component.spec.wrap(linear, options), nn.Module)
        for path, linear in chosen.items()
    }
    replace(model.module, wrapped)
    if not trainable(model.module):
        raise PluginError(f"adapter {component.id}: wrap gives modules without a parameter that trains")
    mx.eval(model.module.trainable_parameters())
    return Adapted(component, options, tuple(chosen))


def save(path: Path, model: Model, adapted: Adapted) -> None:
    """Write the adapter's parameters, with what they belong to, to ``.safetensors`` or ``.npz``.

    Raises:
        DivergedError: a parameter is not finite; an older file is left as it is.
    """
    tensors = trainable(model.module)
    poisoned = [name for name, tensor in tensors.items() if not tensor_file.is_finite(tensor)]
    if poisoned:
        raise DivergedError(f"the adapter is not finite and was not saved: {listing(poisoned)}", where=path)
    component = adapted.component
    record = {
        "adapter": component.id,
        "options": plain(adapted.options),
        "paths": list(adapted.paths),
        "base": model.fingerprint,
        "versions": {"mlxlora": __version__, component.plugin.distribution: component.plugin.version},
    }
    metadata = {METADATA: json.dumps(record, sort_keys=True)}
    tensor_file.save(path, sorted(tensors.items()), metadata, len(tensors))


def load(
    path: Path,
    model: Model,
    registry: Registry,
    wanted: tuple[str | None, Mapping[str, Any]] = (None, {}),
    default: str = "lora",
) -> Adapted:
    """Put the adapter in a file on the base that it was made for, whole or not at all.

    Args:
        path: an adapter file.
        model: changed in place, unless the file does not fit.
        registry: where the adapter is looked up.
        wanted: adapter name and options that the caller insists on. A file
            that says what it holds must agree; one that does not (an ``.npz``
            of another tool) is taken for that adapter.
        default: the adapter when neither the file nor the caller says.

    Raises:
        ModelError: a file of another base, kind, rank or set of layers.
        PluginError: no such adapter.
    """
    tensors, metadata = tensor_file.load(path)
    if tensor_file.FINGERPRINT in metadata:
        _check_whole(tensors, metadata[tensor_file.FINGERPRINT], path)
    name, values = wanted
    record = _record(metadata, path)
    if record is None:
        component = registry.find("adapter", name or default)
        options = parse(component.spec.options, values, owner=f"adapter '{component.spec.name}'")
        return _attach_tensors(path, model, component, options, tensors)
    if record["base"] != model.fingerprint:
        raise ModelError(
            f"made for another base ({record['base'][:12]}, this one is {model.fingerprint[:12]})",
            where=path,
            fix=f"use the model folder that it was trained on, not {model.folder}",
        )
    component = registry.find("adapter", record["adapter"])
    if name is not None and registry.find("adapter", name) != component:
        raise ModelError(f"holds adapter '{component.id}', wanted '{name}'", where=path)
    options = _recorded_options(record, component, values, path)
    return _attach_tensors(path, model, component, options, tensors)


def fill(path: Path, model: Model) -> None:
    """Give the adapter that is on a model the values in a file of the same adapter.

    Raises:
        ModelError: the file is damaged or does not fit; the model is left as it was.
    """
    tensors, metadata = tensor_file.load(path)
    _check_whole(tensors, metadata.get(tensor_file.FINGERPRINT, ""), path)
    faults = tensor_file.mismatches(tensors, trainable(model.module))
    if faults:
        raise ModelError("the adapter does not fit this model: " + "; ".join(faults), where=path)
    model.module.update(tree_unflatten(list(tensors.items())))
    mx.eval(model.module.trainable_parameters())


def trainable(module: nn.Module) -> dict[str, mx.array]:
    """The parameters that train, by path."""
    return dict(tree_flatten(module.trainable_parameters()))


def count(model: Model) -> dict[str, int]:
    """How many parameters there are, packed ones counted as weights, and how many of them train."""
    packed = {path: linear for path, linear in linears(model.module) if not isinstance(linear, nn.Linear)}
    weights = sum(outputs * inputs for outputs, inputs in map(linear_shape, packed.values()))
    others = sum(
        tensor.size
        for name, tensor in parameters(model.module).items()
        if name.rpartition(".")[0] not in packed
    )
    trained = sum(tensor.size for tensor in trainable(model.module).values())
    return {"parameters": weights + others, "trainable_parameters": trained}


def _choose(model: Model, options: AdapterOptions) -> dict[str, nn.Module]:
    """path -> linear of all that the options ask for."""
    layers = len(model.language_model.layers)
    count = layers if options.layers < 0 else min(options.layers, layers)
    chosen = tuple(f"layers.{i}." for i in range(layers - count, layers))
    found = {path: linear for path, linear in linears(model.module) if path.startswith(chosen)}
    names = sorted({path.rpartition(".")[2] for path in found})
    for target in options.targets:
        if not any(_matches(path, target) for path in found):
            raise UsageError(
                f"adapter target '{target}' matches no linear in the top {count} layers "
                f"({nearest(target, names)}there is {listing(names)}, or {ALL_LINEAR})"
            )
    return {
        path: linear
        for path, linear in sorted(found.items())
        if any(_matches(path, target) for target in options.targets)
    }


def _matches(path: str, target: str) -> bool:
    return target == ALL_LINEAR or path == target or path.endswith("." + target)


def _record(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    if METADATA not in metadata:
        return None
    try:
        record = json.loads(metadata[METADATA])
        kinds = {key: type(record[key]) for key in ("adapter", "options", "base")}
        if kinds == {"adapter": str, "options": dict, "base": str}:
            return dict(record)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ModelError("what the file says of itself cannot be read", where=path)


def _recorded_options(
    record: Mapping[str, Any], component: Component, wanted: Mapping[str, Any], path: Path
) -> AdapterOptions:
    """The options in a file, which must be those that the caller insists on."""
    owner = f"adapter '{component.spec.name}'"
    try:
        options: AdapterOptions = parse(component.spec.options, record["options"], owner=owner)
    except UsageError as fault:
        raise ModelError(f"was made with options that cannot be: {fault.what}", where=path) from fault
    held, asked = plain(options), plain(parse(component.spec.options, wanted, owner=owner))
    other = [f"{key} is {held[key]!r}, wanted {asked[key]!r}" for key in wanted if held[key] != asked[key]]
    if other:
        raise ModelError(f"the adapter has other options: {listing(other)}", where=path)
    return options


def _check_whole(tensors: Mapping[str, mx.array], stated: str, path: Path) -> None:
    """Refuse a file whose tensors are not the ones that were written."""
    if tensor_file.fingerprint(tensors) != stated:
        raise ModelError("is damaged: its tensors are not those that were written", where=path)


def _attach_tensors(
    path: Path, model: Model, component: Component, options: AdapterOptions, tensors: Mapping[str, mx.array]
) -> Adapted:
    """Attach and fill; when the tensors do not fit, the model is left as it was."""
    before = dict(linears(model.module))
    adapted = attach(model, component, options, seed=0)
    places = trainable(model.module)
    faults = tensor_file.mismatches(tensors, places)
    if not faults:
        filled = [(name, tensor.astype(places[name].dtype)) for name, tensor in tensors.items()]
        odd = sorted(name for name, tensor in filled if not tensor_file.is_finite(tensor))
        faults = [f"{len(odd)} not finite: {listing(odd)}"] if odd else []
    if faults:
        replace(model.module, {p: before[p] for p in adapted.paths})
        raise ModelError("the adapter does not fit this model: " + "; ".join(faults), where=path)
    model.module.update(tree_unflatten(filled))
    mx.eval(model.module.trainable_parameters())
    return adapted
