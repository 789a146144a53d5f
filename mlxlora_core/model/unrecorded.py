"""An adapter file of another tool, which says nothing of itself: what it is taken for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.model.architectures import folder_args, foreign_linears, within_layer
from mlxlora_core.model.linears import layers_by_path
from mlxlora_core.model.linears import linears as linears_of
from mlxlora_core.model.loading import Model
from mlxlora_core.model.places import at, choose, with_targets
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Component
from mlxlora_core.plugins.sections import AdapterConfig, configure
from mlxlora_core.values import ForeignLinear, FoundAdapter


@dataclass(frozen=True)
class Recognised:
    """What an adapter file is taken for.

    Attributes:
        choice: the adapter, with the options that the file's tensors tell, that the caller states, or that
            are assumed.
        config: where it goes.
        linears: path -> linear that it goes on.
        tensors: of the file, under the names of this model and in its order.
        notes: what was read off the tensors and what was assumed, in words.
    """

    choice: Choice
    config: AdapterConfig
    linears: Mapping[str, nn.Module]
    tensors: Mapping[str, mx.array]
    notes: tuple[str, ...] = ()


def recognise(
    path: Path, model: Model, component: Component, values: Mapping[str, Any], tensors: Mapping[str, mx.array]
) -> Recognised:
    """What an adapter file without a record holds.

    Args:
        path: the file, for messages.
        model: that it is to be put on.
        component: the adapter that it is taken for.
        values: options, and keys of :class:`AdapterConfig`, that the caller states.
        tensors: of the file.

    Raises:
        ModelError: its tensors are not those of the adapter, are of other linears than
            the model has, or are not what the caller states.
        PluginError: the adapter tells something that breaks its contract.
    """
    choice, config = configure(component, values)
    if component.spec.recognise is None:
        config = with_targets(model, config)
        return Recognised(choice, config, choose(model, config), tensors)
    found = _found(path, component, tensors)
    places = _translated(found.paths, model, path)
    linears = at((place.path for place in places.values()), model, path)
    choice = _agreed(path, component, found, choice, values)
    if not values.keys() & plain(config).keys():
        config = _places(model, linears)
    elif choose(model, config := with_targets(model, config)).keys() != linears.keys():
        raise ModelError(
            f"adapts {listing(linears)}, which are not the targets and layers that are asked for", where=path
        )
    ordered = dict(_ordered(tensors, places, found))
    return Recognised(choice, config, linears, ordered, tuple(_notes(path, found, choice, values)))


def _found(path: Path, component: Component, tensors: Mapping[str, mx.array]) -> FoundAdapter:
    """What the adapter makes of the names and shapes of the tensors."""
    try:
        given = component.spec.recognise(path, {name: tensor.shape for name, tensor in tensors.items()})
    except ModelError as fault:
        raise ModelError(fault.what, where=path, fix=fault.fix) from fault
    if given is None:
        raise ModelError(
            f"is no file of adapter '{component.spec.name}': it holds {listing(sorted(tensors), 4)}",
            where=path,
        )
    found: FoundAdapter = component.checked("recognise", given, FoundAdapter)
    return found


def _translated(paths: Sequence[str], model: Model, where: Path) -> dict[str, ForeignLinear]:
    """path in the file -> the linear that it stands for, by this model's names or those of a library."""
    known = dict(linears_of(model.module))
    args = folder_args(model.architecture.spec, model.config)
    theirs = foreign_linears(model.architecture, "hf", args)
    places = {
        path: ForeignLinear(path) if path in known else theirs.get(within_layer(path), ForeignLinear(path))
        for path in paths
    }
    twice = [path for path, count in Counter(place.path for place in places.values()).items() if count > 1]
    if twice:
        raise ModelError(f"adapts {listing(twice)} under two names", where=where)
    return places


def _ordered(
    tensors: Mapping[str, mx.array], places: Mapping[str, ForeignLinear], found: FoundAdapter
) -> Iterator[tuple[str, mx.array]]:
    """The tensors under the names of this model, outputs in its order."""
    for name, tensor in tensors.items():
        path = next((path for path in places if name.startswith(path + ".")), "")
        part, place = name.removeprefix(path + "."), places[path]
        axis = found.outputs.get(part)
        if place.rows is not None and axis is not None and tensor.shape[axis] == len(place.rows):
            tensor = mx.take(tensor, mx.array(list(place.rows)), axis)
        yield f"{place.path}.{part}", tensor


def _agreed(
    path: Path, component: Component, found: FoundAdapter, asked: Choice, values: Mapping[str, Any]
) -> Choice:
    """The options that the tensors tell, and those that are stated, which must not differ."""
    held, wanted = dict(found.options), plain(asked.options)
    other = [
        f"{k} is {held[k]!r}, wanted {wanted[k]!r}" for k in held if k in values and held[k] != wanted[k]
    ]
    if other:
        raise ModelError(f"the adapter has other options: {listing(other)}", where=path)
    return configure(component, {**wanted, **held})[0]


def _places(model: Model, linears: Mapping[str, nn.Module]) -> AdapterConfig:
    """The targets and layers of linears."""
    layer_of = layers_by_path(model.language_model)
    numbers = [layer for path in linears if (layer := layer_of(path)) is not None]
    targets = tuple(sorted({path.rpartition(".")[2] for path in linears}))
    count = len(model.language_model.layers) - min(numbers, default=0)
    return dataclasses.replace(AdapterConfig(), targets=targets, layers=count)


def _notes(path: Path, found: FoundAdapter, choice: Choice, values: Mapping[str, Any]) -> list[str]:
    """What is told of a file that says nothing of itself."""
    told = ", ".join(f"{key} {value}" for key, value in found.options.items())
    notes = [f"{path} says nothing of itself: {told} and {len(found.paths)} linears are read off its tensors"]
    options = plain(choice.options)
    notes += [
        f"{path} does not say its {key}: {options[key]} is assumed (say another with "
        f"--set adapter.{key}=VALUE)"
        for key in found.unstated
        if key not in values
    ]
    return notes
