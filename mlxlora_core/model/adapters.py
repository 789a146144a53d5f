"""Put an adapter on a model; keep it in a file that fits only the base it was made for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora_core.errors import DivergedError, ModelError, UsageError, listing
from mlxlora_core.files import tensor_file
from mlxlora_core.files.targets import is_written
from mlxlora_core.files.tensor_checks import is_finite, mismatches, type_name
from mlxlora_core.model.adapter_record import METADATA as METADATA
from mlxlora_core.model.adapter_record import (
    TrainingRecord,
    check_whole,
    of_another_base,
    read_record,
    recorded_choice,
    shared_names,
    with_shared,
)
from mlxlora_core.model.foreign_adapters import open_foreign_adapter
from mlxlora_core.model.linears import is_packed, packed_shape, parameters, replace
from mlxlora_core.model.loading import Model
from mlxlora_core.model.places import at, choose, options_at, refuse_named, with_targets
from mlxlora_core.model.wrapping import wrap_each
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Component, Registry
from mlxlora_core.plugins.progress import report_progress
from mlxlora_core.plugins.sections import AdapterConfig
from mlxlora_core.values import LazyTensor
from mlxlora_core.version import __version__


@dataclass(frozen=True)
class Adapted:
    """An adapter that is on a model.

    Attributes:
        choice: which adapter, with which options.
        config: where it was to go, targets included.
        options: path of what it wraps -> its options there.
        notes: what was assumed of its file, and whether it is of another base, in words.
    """

    choice: Choice
    config: AdapterConfig
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the linears and embeddings that it wraps."""
        return tuple(self.options)


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
    """Wrap the linears and embeddings that ``config`` chooses; everything else is frozen.

    Args:
        model: changed in place.
        choice: the adapter.
        config: where it goes.
        seed: of its initial values.

    Raises:
        UsageError: a target that matches nothing, with the names that exist, or one that the
            adapter does not go on; an override that matches nothing.
        PluginError: the adapter gives no modules, or other ones than it must.
    """
    config = with_targets(model, config, choice.component.spec.default_targets)
    adapted = _wrap(model, choice, config, choose(model, config), seed)
    _settle(model, choice.component, adapted.paths)
    return adapted


def _settle(model: Model, component: Component, paths: Sequence[str]) -> None:
    """Compute initial values, and lay them out in memory as those that are read from a file.

    Products round otherwise for another layout, and what goes on must go on to the bit.
    """
    modules = dict(model.module.named_modules())
    made: dict[int, tuple[mx.array, mx.array]] = {}  # with what it was made of, whose id it has
    for done, path in enumerate(paths, start=1):  # one after another: a value may take a dense weight
        if component.spec.initialise is not None:
            report_progress("initial values", done - 1, len(paths))
            component.spec.initialise(modules[path])
        found = own(modules[path])
        made |= {id(t): (t, mx.contiguous(t)) for t in found.values() if id(t) not in made}
        laid = {name: made[id(tensor)][1] for name, tensor in found.items()}
        mx.eval(list(laid.values()))
        modules[path].update(tree_unflatten(list(laid.items())))


def _wrap(
    model: Model, choice: Choice, config: AdapterConfig, chosen: Mapping[str, nn.Module], seed: int
) -> Adapted:
    """Ask the adapter to wrap what was chosen, and put what it gives in their places."""
    options = options_at(chosen, model, choice, config)
    mx.random.seed(seed)
    model.module.freeze()
    wrapped = wrap_each(model.language_model, choice.component, chosen, options)
    refuse_named(
        {path: inner for path, inner in chosen.items() if path not in wrapped}, model, choice, config
    )
    if not any(trainable(module) for module in wrapped.values()):
        got = "modules without a parameter that trains" if wrapped else f"None for {listing(chosen)}"
        raise choice.component.breach("wrap", got, "a module that trains for at least one linear")
    replace(model.module, wrapped)
    model.module.eval()  # modules are made for training: what drops at random must not before it begins
    return Adapted(choice, config, {path: options[path] for path in wrapped})


def is_ours(path: Path) -> bool:
    """Whether a file is an adapter file that mlxlora has written, by what its header tells."""
    try:
        read_record(tensor_file.stated(path), path)
    except ModelError:
        return False
    return METADATA in tensor_file.stated(path)


def save(path: Path, model: Model, adapted: Adapted, training: TrainingRecord | None = None) -> None:
    """Write the adapter's parameters, with what they belong to, to ``.safetensors`` or ``.npz``.

    Args:
        path: the file.
        model: with the adapter on it.
        adapted: the adapter.
        training: that it comes from, where one has made it.

    Raises:
        SafetyError: a file that is no adapter of ours is there.
        DivergedError: a parameter is not finite; an older file is left as it is.
    """
    is_written(path, is_ours)
    tensors = own(model.module, adapted.paths)
    poisoned = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if poisoned:
        raise DivergedError(f"the adapter is not finite and was not saved: {listing(poisoned)}", where=path)
    component = adapted.choice.component
    shared = shared_names(tensors)
    record = {
        "adapter": component.id,
        "options": plain(adapted.choice.options),
        "config": plain(adapted.config),
        "paths": list(adapted.paths),
        "base": model.fingerprint,
        **({"base_name": model.name} if model.name else {}),
        **({"shared": shared} if shared else {}),
        **({"training": asdict(training)} if training is not None else {}),
        "versions": {"mlxlora": __version__, component.plugin.distribution: component.plugin.version},
    }
    metadata = {METADATA: json.dumps(record, sort_keys=True)}
    held = sorted((name, tensor) for name, tensor in tensors.items() if name not in shared)
    tensor_file.save(path, held, metadata, len(held))


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
    stated = tensor_file.stated(path)
    if METADATA not in stated:
        if tensor_file.FINGERPRINT in stated:
            check_whole(tensor_file.load(path)[0], stated[tensor_file.FINGERPRINT], path)
        opened = open_foreign_adapter(path, model, registry, name, values)
        return _attach_tensors(
            path, model, opened.choice, opened.config, opened.linears, opened.tensors, opened.notes
        )
    tensors, metadata = tensor_file.load(path)
    if tensor_file.FINGERPRINT in metadata:
        check_whole(tensors, metadata[tensor_file.FINGERPRINT], path)
    record = read_record(metadata, path)
    if record is None:
        raise ModelError("changed while it was read", where=path, fix="start again")
    notes = of_another_base(record["base"], model, path, any_base)
    component = registry.find("adapter", record["adapter"])
    if name is not None and registry.find("adapter", name) != component:
        raise ModelError(f"holds adapter '{component.id}', wanted '{name}'", where=path)
    choice, config = recorded_choice(record, component, values, path)
    tensors = with_shared(tensors, record, path)
    return _attach_tensors(path, model, choice, config, at(record["paths"], model, path), tensors, notes)


def load_file(file: AdapterFile, model: Model, registry: Registry) -> Adapted:
    """Put the adapter in a file on a model; see :func:`load`."""
    return load(file.path, model, registry, file.name, file.values, any_base=file.any_base)


def fill(path: Path, model: Model, adapted: Adapted) -> None:
    """Give the adapter that is on a model the values in a file of the same adapter.

    Raises:
        ModelError: the file is damaged or does not fit; the model is left as it was.
    """
    tensors, metadata = tensor_file.load(path)
    check_whole(tensors, metadata.get(tensor_file.FINGERPRINT, ""), path)
    tensors = with_shared(tensors, read_record(metadata, path) or {}, path)
    faults = mismatches(tensors, own(model.module, adapted.paths))
    if faults:
        raise ModelError("the adapter does not fit this model: " + "; ".join(faults), where=path)
    model.module.update(tree_unflatten(list(tensors.items())))
    mx.eval(list(tensors.values()))


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


def fused_bias(component: Component, wrapped: nn.Module, before: mx.array) -> mx.array:
    """The bias that goes with a :func:`fused_weight`, in the type of the one before.

    Args:
        component: the adapter.
        wrapped: the linear with the adapter on it.
        before: the linear's own bias.

    Raises:
        PluginError: it is of another shape, or has values that are not finite.
    """
    if component.spec.fuse_bias is None:
        return before
    given = component.spec.fuse_bias(wrapped, before.astype(mx.float32))
    bias = component.checked("fuse_bias", given, mx.array).astype(before.dtype)
    if bias.shape != before.shape or not is_finite(bias):
        got = f"{bias.shape}" if bias.shape != before.shape else "values that are not finite"
        raise component.breach("fuse_bias", got, f"{before.shape} finite values")
    return bias


def trainable(module: nn.Module) -> dict[str, mx.array]:
    """The parameters that train, by path."""
    return dict(tree_flatten(module.trainable_parameters()))


def own(module: nn.Module, paths: Iterable[str] = ("",)) -> dict[str, mx.array]:
    """The parameters of adapters, trained or not, by path: all but those of what they wrap.

    Args:
        module: with the adapters in it.
        paths: of the wrapped modules; left out, ``module`` is itself one.
    """
    modules = dict(module.named_modules())
    return {
        f"{path}.{name}".lstrip("."): tensor
        for path in paths
        for name, tensor in parameters(modules[path]).items()
        if not name.startswith("linear.")
    }


def wrap_again(model: Model, adapted: Adapted) -> None:
    """Put the adapter anew on the linears that stand inside it now, with the parameters that it has.

    An adapter may work something out of a weight when it is wrapped around it, as DoRA does, and
    must do so again where another linear has come into its place.
    """
    modules = dict(model.module.named_modules())
    inside = {path: modules[path]["linear"] for path in adapted.paths}
    again = wrap_each(model.language_model, adapted.choice.component, inside, adapted.options)
    for path, module in again.items():
        module.update(tree_unflatten(list(own(modules[path]).items())))
    replace(model.module, again)
    model.module.freeze()
    model.module.eval()


def count(model: Model) -> dict[str, int]:
    """How many parameters there are, packed ones counted as weights, and how many of them train."""
    packed = {path: child for path, child in model.module.named_modules() if is_packed(child)}
    weights = sum(math.prod(packed_shape(child)) for child in packed.values())
    others = sum(
        tensor.size
        for tensor in {
            id(tensor): tensor  # one that several modules share counts once
            for name, tensor in parameters(model.module).items()
            if name.rpartition(".")[0] not in packed
        }.values()
    )
    trained = sum(tensor.size for tensor in trainable(model.module).values())
    return {"parameters": weights + others, "trainable_parameters": trained}


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
    places = own(model.module, adapted.paths)
    faults = mismatches(tensors, places)
    if not faults:
        try:
            read = {id(t): t.read() if isinstance(t, LazyTensor) else t for t in tensors.values()}
        except BaseException:
            replace(model.module, dict(chosen))
            raise
        cast = {id(tensor): read[id(tensor)].astype(places[n].dtype) for n, tensor in tensors.items()}
        filled = [(name, cast[id(tensor)]) for name, tensor in tensors.items()]
        odd = sorted(name for name, tensor in filled if not is_finite(tensor))
        faults = [f"{len(odd)} not finite: {listing(odd)}"] if odd else []
    if faults:
        replace(model.module, dict(chosen))
        raise ModelError("the adapter does not fit this model: " + "; ".join(faults), where=path)
    model.module.update(tree_unflatten(filled))
    mx.eval(list(cast.values()))
    return dataclasses.replace(adapted, notes=tuple(notes))
