"""An adapter of another tool: who opens it, and what it becomes on this model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora_core.errors import ModelError, UsageError, listing
from mlxlora_core.files import tensor_file
from mlxlora_core.model.adapter_targets import chosen_modules, modules_at, with_targets
from mlxlora_core.model.architectures import checked_notes, placed
from mlxlora_core.model.foreign_linears import Part, parts_of
from mlxlora_core.model.linears import is_linear, layers_by_path
from mlxlora_core.model.loading import Model
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.sections import AdapterConfig, configure
from mlxlora_core.values import ForeignAdapter, LazyTensor


@dataclass(frozen=True)
class OpenedAdapter:
    """What an adapter of another tool becomes here.

    Attributes:
        choice: the adapter, with options that its files tell, that the caller states or that are assumed.
        config: where it goes.
        linears: path -> linear that it goes on.
        tensors: name -> parameter, under the names of this model and in its order, not read yet.
        notes: what was read off its files and what was assumed, in words.
    """

    choice: Choice
    config: AdapterConfig
    linears: Mapping[str, nn.Module]
    tensors: Mapping[str, LazyTensor]
    notes: tuple[str, ...] = ()


def open_foreign_adapter(
    path: Path, model: Model, registry: Registry, name: str | None, values: Mapping[str, Any]
) -> OpenedAdapter:
    """What an adapter that mlxlora has not written becomes on a model; none of its tensors is read.

    Args:
        path: a folder, or a file.
        model: that it is to be put on.
        registry: where adapter loaders and adapters are looked up.
        name: the adapter that the caller insists on; a file that no loader knows is taken for it.
        values: options, and keys of :class:`AdapterConfig`, that the caller states.

    Raises:
        ModelError: nobody can read it, it is of other linears than the model has, or it
            is not what the caller states.
        PluginError: there is no such adapter here, or a plugin breaks its contract.
    """
    loader = find_adapter_loader(path, registry)
    if loader is None:
        return _as_stated(path, model, registry, name, values)
    found = open_adapter(loader, path)
    component = registry.find("adapter", found.adapter)
    if name is not None and registry.find("adapter", name) != component:
        raise ModelError(f"holds adapter '{component.id}', wanted '{name}'", where=path)
    parts = placed(path, parts_of, model, found.layout, list(found.linears))
    linears = modules_at(sorted(part.path for theirs in parts.values() for part in theirs), model, path)
    if found.embedding_alone and not model.language_model.head_path:
        _refuse_embeddings(linears, path)
    choice = _agreed(path, component, found, values)
    config = _config(path, model, linears, configure(component, values)[1], values)
    differing = {part.path: found.overrides.get(at, {}) for at, theirs in parts.items() for part in theirs}
    config = dataclasses.replace(config, overrides=(*config.overrides, *_overrides(differing)))
    tensors = dict(_tensors(loader, found, parts, path))
    return OpenedAdapter(choice, config, linears, tensors, tuple(_notes(path, loader, found, choice, values)))


def find_adapter_loader(path: Path, registry: Registry) -> Component | None:
    """The one adapter loader that knows a path.

    Raises:
        ModelError: several do.
    """
    found = [component for component in registry.of("adapter-loader") if component.spec.detect(path)]
    if len(found) > 1:
        ids = listing(component.id for component in found)
        fix = "leave the plugins out that are not meant: see mlxlora plugins"
        raise ModelError(f"{ids} can read this adapter", where=path, fix=fix)
    return found[0] if found else None


def _as_stated(
    path: Path, model: Model, registry: Registry, name: str | None, values: Mapping[str, Any]
) -> OpenedAdapter:
    """A file that says nothing of itself, as the adapter and the options that the caller names.

    Raises:
        ModelError: it is a folder, no tensor file, or the caller names no adapter.
    """
    known = f"there is {listing(sorted(c.spec.name for c in registry.of('adapter-loader')))}"
    if path.is_dir():
        fix = "name the adapter file in it, or a folder that PEFT or mlx-lm has written"
        raise ModelError(f"no adapter loader knows this folder ({known})", where=path, fix=fix)
    tensor_file.load(path)  # says what is wrong with the file, if that is why nobody knows it
    tensors = tensor_file.lazy(path)
    if name is None:
        held = f"holds {listing(sorted(tensors), 4)}" if tensors else "holds no tensors"
        fix = "say with --adapter which adapter it is of, if it is one"
        raise ModelError(f"no adapter loader knows this file ({known}): it {held}", where=path, fix=fix)
    choice, config = configure(registry.find("adapter", name), values)
    config = with_targets(model, config)
    return OpenedAdapter(choice, config, chosen_modules(model, config), tensors)


def open_adapter(loader: Component, path: Path) -> ForeignAdapter:
    """What a loader gives of a path, held against the contract."""
    given = placed(path, loader.spec.open, path, loader.spec.options())
    opened: ForeignAdapter = loader.checked("open", given, ForeignAdapter)
    for name in ("adapter", "layout"):
        loader.checked("open", getattr(opened, name), str)
    for name in ("options", "linears", "outputs", "inputs", "overrides"):
        part = getattr(opened, name)
        if not isinstance(part, Mapping):
            raise loader.breach("open", f"{name} of type {type(part).__name__}", "a mapping")
    for where, tensors in opened.linears.items():
        loader.checked("open", where, str)
        if not isinstance(tensors, Mapping) or not tensors:
            raise loader.breach("open", f"no tensors of {where}", "a mapping of names to tensors")
        for tensor in tensors.values():
            loader.checked("open", tensor, LazyTensor)
    if not opened.linears:
        raise loader.breach("open", "an adapter of no linear", "a ModelError, or an adapter of some")
    for name, axis in (*opened.outputs.items(), *opened.inputs.items()):
        if type(axis) is not int or axis < 0:
            raise loader.breach("open", f"axis {axis!r} of {name}", "a whole number of at least 0")
    unknown = sorted(opened.overrides.keys() - opened.linears.keys())
    if unknown:
        raise loader.breach("open", f"options of {listing(unknown)}", "options of linears that it adapts")
    checked_notes(loader, "open", opened.notes)
    return opened


def _tensors(
    loader: Component, found: ForeignAdapter, parts: Mapping[str, Sequence[Part]], where: Path
) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors under the names of this model, outputs in its order.

    One that stands in several modules, and is taken in the same way, comes as one.
    """
    made: dict[tuple[Any, ...], LazyTensor] = {}
    for path, tensors in found.linears.items():
        for name, tensor in tensors.items():
            axes = found.outputs.get(name), found.inputs.get(name)
            if any(axis is not None and axis >= len(tensor.shape) for axis in axes):
                got = f"{name} of shape {tensor.shape} with axes {axes} along outputs and inputs"
                raise loader.breach("open", got, "axes that it has")
            _check_outputs(path, name, tensor, axes[0], parts[path], where)
            for part in parts[path]:
                how = (id(tensor), *axes, id(part.rows), part.start, part.outputs, part.inputs)
                made[how] = made.get(how) or _of_part(loader, name, tensor, axes, part)
                yield f"{part.path}.{name}", made[how]


def _check_outputs(
    path: str, name: str, tensor: LazyTensor, axis: int | None, parts: Sequence[Part], where: Path
) -> None:
    """Refuse a tensor of a fused linear that is not as long as its parts together."""
    if axis is None or parts[0].start is None:
        return
    wanted = sum(part.outputs for part in parts)
    if tensor.shape[axis] != wanted:
        raise ModelError(f"{path}.{name} is {tensor.shape}, wanted {wanted} outputs", where=where)


def _of_part(
    loader: Component, name: str, tensor: LazyTensor, axes: tuple[int | None, int | None], part: Part
) -> LazyTensor:
    """What of a tensor belongs to a linear here, in its order.

    Args:
        loader: who has opened it.
        name: of the parameter.
        tensor: as it is there.
        axes: along the outputs, and along inputs of which only the first are the linear's.
        part: which linear.
    """
    outputs, inputs = axes
    shape = list(tensor.shape)
    picked = {}
    if outputs is not None:
        length = shape[outputs] if part.start is None else part.outputs
        # Rows of another number are those of another model, which the shapes will tell.
        rows = part.rows if part.rows is not None and len(part.rows) == length else range(length)
        if part.start is not None or rows is part.rows:
            picked[outputs] = [(part.start or 0) + row for row in rows]
    if inputs is not None and shape[inputs] > part.inputs:
        picked[inputs] = list(range(part.inputs))
    for axis, taken in picked.items():
        shape[axis] = len(taken)

    def read() -> mx.array:
        value = loader.checked("open", tensor.read(), mx.array)
        if value.shape != tuple(tensor.shape):
            raise loader.breach("open", f"{name} that reads {value.shape}", f"{tuple(tensor.shape)}, as told")
        for axis, taken in picked.items():
            value = mx.take(value, mx.array(taken), axis)
        # Row by row, as it is read from a file of ours: sums in another order differ in the last bits.
        return mx.contiguous(value)

    return LazyTensor(tuple(shape), tensor.dtype, read)


def _refuse_embeddings(linears: Mapping[str, nn.Module], where: Path) -> None:
    """Refuse an update of an embedding that is the output head too, which it would leave as it is."""
    found = [path for path, module in linears.items() if not is_linear(module)]
    if found:
        what = f"adapts {listing(found)} and not the output head, which is the same weights in this model"
        raise ModelError(what, where=where)


def _agreed(path: Path, component: Component, found: ForeignAdapter, values: Mapping[str, Any]) -> Choice:
    """The options that the files tell, and those that are stated, which must not differ."""
    held, wanted = dict(found.options), plain(configure(component, values)[0].options)
    other = [
        f"{k} is {held[k]!r}, wanted {wanted[k]!r}"
        for k in held
        if k in values and k in wanted and held[k] != wanted[k]
    ]
    if other:
        raise ModelError(f"the adapter has other options: {listing(other)}", where=path)
    try:
        return configure(component, {**wanted, **held})[0]
    except UsageError as fault:
        raise ModelError(f"was made with options that cannot be: {fault.what}", where=path) from fault


def _config(
    path: Path,
    model: Model,
    linears: Mapping[str, nn.Module],
    asked: AdapterConfig,
    values: Mapping[str, Any],
) -> AdapterConfig:
    """The targets and layers of linears, which must be those that are asked for, if any are."""
    if values.keys() & plain(asked).keys():
        asked = with_targets(model, asked)
        if chosen_modules(model, asked).keys() != linears.keys():
            what = f"adapts {listing(linears)}, which are not the targets and layers that are asked for"
            raise ModelError(what, where=path)
        return asked
    layer_of = layers_by_path(model.language_model)
    numbers = [layer for at_path in linears if (layer := layer_of(at_path)) is not None]
    targets = tuple(sorted({at_path.rpartition(".")[2] for at_path in linears}))
    count = len(model.language_model.layers) - min(numbers, default=0)
    return dataclasses.replace(AdapterConfig(), targets=targets, layers=count)


def _overrides(differing: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Overrides that say which options differ where, in few words.

    Args:
        differing: path -> options that differ there, of all that are adapted.
    """
    of_name: dict[str, list[Mapping[str, Any]]] = {}
    for path, options in differing.items():
        of_name.setdefault(path.rpartition(".")[2], []).append(options)
    alike = {name for name, found in of_name.items() if all(options == found[0] for options in found)}
    told = dict.fromkeys(sorted(alike)) | dict.fromkeys(
        path for path in sorted(differing) if path.rpartition(".")[2] not in alike
    )
    for pattern in told:
        options = of_name[pattern][0] if pattern in alike else differing[pattern]
        if options:
            yield f"{pattern}: " + ", ".join(f"{key}={value}" for key, value in options.items())


def _notes(
    path: Path, loader: Component, found: ForeignAdapter, choice: Choice, values: Mapping[str, Any]
) -> Iterator[str]:
    """What is told of an adapter that says nothing of its base."""
    told = ", ".join(f"{key} {value}" for key, value in found.options.items()) or "no options"
    count, others = len(found.linears), len(found.overrides)
    told += f" and {count} linears" + (f", {others} of them with other options" if others else "")
    yield (
        f"{path} was read as {choice.component.spec.name} by {loader.spec.name}: {told}; "
        "which model it was made for cannot be checked, only that its shapes fit"
    )
    yield from found.notes
    options = plain(choice.options)
    for key in found.unstated:
        if key not in values:
            yield (
                f"{path} does not say its {key}: {options[key]} is assumed (say another with "
                f"--set adapter.{key}=VALUE)"
            )
