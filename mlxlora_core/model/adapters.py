"""Put an adapter on a model; keep it in a file that fits only the base it was made for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.errors import DivergedError, ModelError, UsageError, listing
from mlxlora_core.files import tensor_file
from mlxlora_core.files.documents import parse_form
from mlxlora_core.files.forms import Items, Map, Option, Plain, Strict, Table, Text
from mlxlora_core.files.targets import is_written
from mlxlora_core.files.tensor_checks import is_finite, mismatches, type_name
from mlxlora_core.model.foreign_adapters import open_foreign_adapter
from mlxlora_core.model.linears import (
    is_packed,
    layers_by_path,
    linear_shape,
    packed_shape,
    parameters,
    replace,
)
from mlxlora_core.model.loading import Model
from mlxlora_core.model.places import at, choose, with_targets
from mlxlora_core.options import divide, plain
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.sections import AdapterConfig, configure
from mlxlora_core.values import LazyTensor, Place
from mlxlora_core.version import __version__

METADATA = "mlxlora"

#: what an adapter file says of itself; in files of before, options hold the config
RECORD_FORM = Table(
    {
        "adapter": Text(),
        "options": Strict(Map(Plain())),
        "config": Option(Strict(Map(Plain()))),
        "paths": Items(Text()),
        "base": Text(),
    }
)


@dataclass(frozen=True)
class Adapted:
    """An adapter that is on a model.

    Attributes:
        choice: which adapter, with which options.
        config: where it was to go, targets included.
        paths: the linears that it wraps.
        notes: what was assumed of its file, and whether it is of another base, in words.
    """

    choice: Choice
    config: AdapterConfig
    paths: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterFile:
    """An adapter in a file, and what the caller insists on; see :func:`load`.

    Attributes:
        path: an adapter file.
        name: the adapter that the caller insists on, or None.
        values: options, and keys of :class:`AdapterConfig`, that the caller insists on.
        any_base: whether it may be put on another base than the one that it was made for.
    """

    path: Path
    name: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    any_base: bool = False


def attach(model: Model, choice: Choice, config: AdapterConfig, seed: int) -> Adapted:
    """Wrap the linears that ``config`` chooses; everything else is frozen.

    Args:
        model: changed in place.
        choice: the adapter.
        config: where it goes.
        seed: of its initial values.

    Raises:
        UsageError: a target that matches nothing, with the names that exist.
        PluginError: the adapter gives no modules, or other ones than it must.
    """
    config = with_targets(model, config)
    return _wrap(model, choice, config, choose(model, config), seed)


def _wrap(
    model: Model, choice: Choice, config: AdapterConfig, linears: Mapping[str, nn.Module], seed: int
) -> Adapted:
    """Ask the adapter to wrap these linears, and put what it gives in their places."""
    mx.random.seed(seed)
    model.module.freeze()
    layer_of = layers_by_path(model.language_model)
    wrapped = {}
    for path, linear in linears.items():
        place = Place(path, layer_of(path), linear_shape(linear))
        module = choice.component.spec.wrap(linear, place, choice.options)
        if module is not None:
            wrapped[path] = _checked(choice.component, linear, module)
    trained = [tensor for module in wrapped.values() for tensor in trainable(module).values()]
    if not trained:
        got = "modules without a parameter that trains" if wrapped else f"None for {listing(linears)}"
        raise choice.component.breach("wrap", got, "a module that trains for at least one linear")
    replace(model.module, wrapped)
    model.module.eval()  # modules are made for training: what drops at random must not before it begins
    mx.eval(trained)
    return Adapted(choice, config, tuple(wrapped))


def _checked(component: Component, linear: nn.Module, module: Any) -> nn.Module:
    """What ``wrap`` has given for a linear, if it is what the contract says."""
    wrapped = component.checked("wrap", module, nn.Module)
    if wrapped.get("linear") is not linear:
        got = f"a {type(wrapped).__name__} without the linear"
        raise component.breach("wrap", got, "a module that keeps it as its child 'linear'")
    for name, tensor in trainable(wrapped).items():
        if name.startswith("linear."):
            raise component.breach("wrap", f"a module in which {name} trains", "the linear frozen")
        if not mx.issubdtype(tensor.dtype, mx.floating):
            raise component.breach("wrap", f"{name} of type {tensor.dtype} to train", "a floating one")
    return wrapped


def is_ours(path: Path) -> bool:
    """Whether a file is an adapter file that mlxlora has written, by what its header tells."""
    try:
        _record(tensor_file.stated(path), path)
    except ModelError:
        return False
    return METADATA in tensor_file.stated(path)


def save(path: Path, model: Model, adapted: Adapted) -> None:
    """Write the adapter's parameters, with what they belong to, to ``.safetensors`` or ``.npz``.

    Raises:
        SafetyError: a file that is no adapter of ours is there.
        DivergedError: a parameter is not finite; an older file is left as it is.
    """
    is_written(path, is_ours)
    tensors = trainable(model.module)
    poisoned = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if poisoned:
        raise DivergedError(f"the adapter is not finite and was not saved: {listing(poisoned)}", where=path)
    component = adapted.choice.component
    record = {
        "adapter": component.id,
        "options": plain(adapted.choice.options),
        "config": plain(adapted.config),
        "paths": list(adapted.paths),
        "base": model.fingerprint,
        **({"base_name": model.name} if model.name else {}),
        "versions": {"mlxlora": __version__, component.plugin.distribution: component.plugin.version},
    }
    metadata = {METADATA: json.dumps(record, sort_keys=True)}
    tensor_file.save(path, sorted(tensors.items()), metadata, len(tensors))


def load(
    path: Path,
    model: Model,
    registry: Registry,
    name: str | None = None,
    values: Mapping[str, Any] = MappingProxyType({}),
    *,
    any_base: bool = False,
) -> Adapted:
    """Put the adapter in a file on the base that it was made for, whole or not at all.

    Args:
        path: an adapter file, or what an adapter loader reads: a folder or a file of another tool.
        model: changed in place, unless the file does not fit.
        registry: where adapters and adapter loaders are looked up.
        name: the adapter that the caller insists on. What says or shows what it
            holds must agree; a file that no loader knows is taken for that adapter.
        values: options, and keys of :class:`AdapterConfig`, that the caller insists on.
        any_base: whether a base that has the same linears will do, such as the
            dense model that the base was quantized from.

    Raises:
        ModelError: a file of another base, kind, rank or set of layers.
        PluginError: no such adapter, or one that breaks its contract.
    """
    if METADATA not in tensor_file.stated(path):
        opened = open_foreign_adapter(path, model, registry, name, values)
        return _attach_tensors(
            path, model, opened.choice, opened.config, opened.linears, opened.tensors, opened.notes
        )
    tensors, metadata = tensor_file.load(path)
    if tensor_file.FINGERPRINT in metadata:
        _check_whole(tensors, metadata[tensor_file.FINGERPRINT], path)
    record = _record(metadata, path)
    if record is None:
        raise ModelError("changed while it was read", where=path, fix="start again")
    notes = _other_base(record["base"], model, path, any_base)
    component = registry.find("adapter", record["adapter"])
    if name is not None and registry.find("adapter", name) != component:
        raise ModelError(f"holds adapter '{component.id}', wanted '{name}'", where=path)
    choice, config = _recorded(record, component, values, path)
    return _attach_tensors(path, model, choice, config, at(record["paths"], model, path), tensors, notes)


def load_file(file: AdapterFile, model: Model, registry: Registry) -> Adapted:
    """Put the adapter in a file on a model; see :func:`load`."""
    return load(file.path, model, registry, file.name, file.values, any_base=file.any_base)


def fill(path: Path, model: Model) -> None:
    """Give the adapter that is on a model the values in a file of the same adapter.

    Raises:
        ModelError: the file is damaged or does not fit; the model is left as it was.
    """
    tensors, metadata = tensor_file.load(path)
    _check_whole(tensors, metadata.get(tensor_file.FINGERPRINT, ""), path)
    faults = mismatches(tensors, trainable(model.module))
    if faults:
        raise ModelError("the adapter does not fit this model: " + "; ".join(faults), where=path)
    model.module.update(tree_unflatten(list(tensors.items())))
    mx.eval(model.module.trainable_parameters())


def fused_weight(component: Component, wrapped: nn.Module, before: mx.array) -> mx.array:
    """The weight that an adapter says is that of its linear with the adapter in it.

    Args:
        component: the adapter.
        wrapped: the linear with the adapter on it.
        before: the linear's own weight, float32.

    Raises:
        PluginError: it gives another shape or type, or values that are not finite.
    """
    weight = component.checked("fuse", component.spec.fuse(wrapped, before), mx.array)
    if weight.shape != before.shape or weight.dtype != mx.float32:
        got = f"{weight.shape} {type_name(weight.dtype)}"
        raise component.breach("fuse", got, f"{before.shape} float32")
    if not is_finite(weight):
        raise component.breach("fuse", "values that are not finite", "finite ones")
    return weight


def trainable(module: nn.Module) -> dict[str, mx.array]:
    """The parameters that train, by path."""
    return dict(tree_flatten(module.trainable_parameters()))


def count(model: Model) -> dict[str, int]:
    """How many parameters there are, packed ones counted as weights, and how many of them train."""
    packed = {path: child for path, child in model.module.named_modules() if is_packed(child)}
    weights = sum(math.prod(packed_shape(child)) for child in packed.values())
    others = sum(
        tensor.size
        for name, tensor in parameters(model.module).items()
        if name.rpartition(".")[0] not in packed
    )
    trained = sum(tensor.size for tensor in trainable(model.module).values())
    return {"parameters": weights + others, "trainable_parameters": trained}


def _record(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """What the file says of itself, in the form that it has today, or None for nothing."""
    if METADATA not in metadata:
        return None
    said = metadata[METADATA].encode("utf-8", "surrogatepass")
    record: dict[str, Any] = parse_form(said, RECORD_FORM, f"{path} (what it says of itself)")
    if "config" not in record:  # written when targets and layers stood among the options
        record["config"], record["options"] = divide(record["options"], AdapterConfig)
    return record


def _other_base(base: str, model: Model, path: Path, allowed: bool) -> list[str]:
    """What to tell of an adapter that was made for another base.

    Raises:
        ModelError: that is not allowed.
    """
    if base == model.fingerprint:
        return []
    what = f"made for another base ({base[:12]}, this one is {model.fingerprint[:12]})"
    if allowed:
        return [f"{path}: {what}, and put on this one all the same: what it does here is not what it learnt"]
    fix = (
        f"use the model folder that it was trained on, not {model.folder}; "
        "if this is the same model in other bits, give the --quantize that it was trained with, "
        "or add --base-mismatch allow"
    )
    raise ModelError(what, where=path, fix=fix)


def _recorded(
    record: Mapping[str, Any], component: Component, wanted: Mapping[str, Any], path: Path
) -> tuple[Choice, AdapterConfig]:
    """Options and places in a file, which must be those that the caller insists on."""
    try:
        choice, config = configure(component, {**record["options"], **record["config"]})
    except UsageError as fault:
        raise ModelError(f"was made with options that cannot be: {fault.what}", where=path) from fault
    asked_choice, asked_config = configure(component, wanted)
    held, asked = (
        {**plain(c.options), **plain(g)} for c, g in ((choice, config), (asked_choice, asked_config))
    )
    other = [f"{key} is {held[key]!r}, wanted {asked[key]!r}" for key in wanted if held[key] != asked[key]]
    if other:
        raise ModelError(f"the adapter has other options: {listing(other)}", where=path)
    return choice, config


def _check_whole(tensors: Mapping[str, mx.array], stated: str, path: Path) -> None:
    """Refuse a file whose tensors are not the ones that were written."""
    if tensor_file.fingerprint(tensors) != stated:
        raise ModelError("is damaged: its tensors are not those that were written", where=path)


def _attach_tensors(
    path: Path,
    model: Model,
    choice: Choice,
    config: AdapterConfig,
    chosen: Mapping[str, nn.Module],
    tensors: Mapping[str, mx.array | LazyTensor],
    notes: Sequence[str],
) -> Adapted:
    """Wrap and fill; when the tensors do not fit, the model is left as it was."""
    try:
        adapted = _wrap(model, choice, config, chosen, seed=0)
    except UsageError as fault:
        raise ModelError(f"the adapter does not fit this model: {fault.what}", where=path) from fault
    places = trainable(model.module)
    faults = mismatches(tensors, places)
    if not faults:
        try:
            read = [(n, t.read() if isinstance(t, LazyTensor) else t) for n, t in tensors.items()]
        except BaseException:
            replace(model.module, dict(chosen))
            raise
        filled = [(name, tensor.astype(places[name].dtype)) for name, tensor in read]
        odd = sorted(name for name, tensor in filled if not is_finite(tensor))
        faults = [f"{len(odd)} not finite: {listing(odd)}"] if odd else []
    if faults:
        replace(model.module, dict(chosen))
        raise ModelError("the adapter does not fit this model: " + "; ".join(faults), where=path)
    model.module.update(tree_unflatten(filled))
    mx.eval(model.module.trainable_parameters())
    return dataclasses.replace(adapted, notes=tuple(notes))
