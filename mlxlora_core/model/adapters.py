"""Put an adapter on a model; save it to a file that fits only the base it was trained on."""

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
from mlxlora_core.files.tensor_checks import is_finite, mismatches
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
from mlxlora_core.model.adapter_targets import (
    chosen_modules,
    modules_at,
    options_at,
    refuse_named,
    with_targets,
)
from mlxlora_core.model.foreign_adapters import open_foreign_adapter
from mlxlora_core.model.linears import is_packed, packed_shape, parameters, replace_modules
from mlxlora_core.model.loading import Model
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
        choice: the adapter and its options.
        config: the layers and targets that were asked for.
        options: path of each module that it wraps -> its options there.
        notes: what was assumed about its file, and whether it is of another base, in words.
    """

    choice: Choice
    config: AdapterConfig
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the linears and embeddings that it wraps."""
        return tuple(self.options)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter in a file, and what the caller requires of it; see :func:`load`.

    Attributes:
        path: an adapter file.
        name: the adapter that it must hold, or None for any.
        values: options, and keys of :class:`AdapterConfig`, that it must have.
        any_base: whether it may go on another base than the one that it was trained on.
    """

    path: Path
    name: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    any_base: bool = False


def attach(model: Model, choice: Choice, config: AdapterConfig, seed: int) -> Adapted:
    """Wrap the linears and embeddings that ``config`` chooses; everything else is frozen.

    Args:
        model: changed in place.
        choice: the adapter and its options.
        config: which layers and targets it goes on.
        seed: for its initial values.

    Raises:
        UsageError: a target that matches nothing (with the names that exist), or that the adapter
            does not support; an override that matches nothing.
        PluginError: the adapter returns no modules, or modules that break its contract.
    """
    config = with_targets(model, config, choice.component.spec.default_targets)
    adapted = _wrap(model, choice, config, chosen_modules(model, config), seed)
    _settle(model, choice.component, adapted.paths)
    return adapted


def _settle(model: Model, component: Component, paths: Sequence[str]) -> None:
    """Compute initial values, contiguous in memory like those that are read from a file.

    Products round differently for another layout, and a resumed training must be the same to the bit.
    """
    modules = dict(model.module.named_modules())
    made: dict[int, tuple[mx.array, mx.array]] = {}  # holding the original keeps its id from being reused
    for done, path in enumerate(paths, start=1):  # one after another: a value may take a dense weight
        if component.spec.initialise is not None:
            report_progress("initial values", done - 1, len(paths))
            component.spec.initialise(modules[path])
        found = adapter_parameters(modules[path])
        made |= {id(t): (t, mx.contiguous(t)) for t in found.values() if id(t) not in made}
        laid = {name: made[id(tensor)][1] for name, tensor in found.items()}
        mx.eval(list(laid.values()))
        modules[path].update(tree_unflatten(list(laid.items())))


def _wrap(
    model: Model, choice: Choice, config: AdapterConfig, chosen: Mapping[str, nn.Module], seed: int
) -> Adapted:
    """Ask the adapter to wrap each chosen module, and put the results in their places."""
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
    replace_modules(model.module, wrapped)
    model.module.eval()  # new modules are in training mode; dropout must be off until training begins
    return Adapted(choice, config, {path: options[path] for path in wrapped})


def is_ours(path: Path) -> bool:
    """Whether a file is an adapter file that mlxlora has written, judged by its header."""
    try:
        read_record(tensor_file.stated(path), path)
    except ModelError:
        return False
    return METADATA in tensor_file.stated(path)


def save(path: Path, model: Model, adapted: Adapted, training: TrainingRecord | None = None) -> None:
    """Write the adapter's parameters, and a record of what they belong to, to ``.safetensors`` or ``.npz``.

    Args:
        path: the file.
        model: with the adapter on it.
        adapted: the adapter.
        training: the training that it comes from, if any.

    Raises:
        SafetyError: the path holds a file that is not an adapter file of mlxlora.
        DivergedError: a parameter is not finite; an existing file is left as it is.
    """
    is_written(path, is_ours)
    tensors = adapter_parameters(model.module, adapted.paths)
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
    """Put the adapter in a file on the base that it was trained on, completely or not at all.

    Args:
        path: an adapter file, or a folder or file of another tool that an adapter loader reads.
        model: changed in place; unchanged if the file does not fit.
        registry: where adapters and adapter loaders are looked up.
        name: the adapter that the file must hold, or None for any. A file that no loader
            recognizes is read as this adapter.
        values: options, and keys of :class:`AdapterConfig`, that the file must agree with.
        any_base: whether another base with the same linears is accepted, such as the dense model
            that the base was quantized from.

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
    return _attach_tensors(
        path, model, choice, config, modules_at(record["paths"], model, path), tensors, notes
    )


def load_file(file: AdapterFile, model: Model, registry: Registry) -> Adapted:
    """Put the adapter in a file on a model; see :func:`load`."""
    return load(file.path, model, registry, file.name, file.values, any_base=file.any_base)


def fill(path: Path, model: Model, adapted: Adapted) -> None:
    """Replace the values of the adapter on a model by those in a file of the same adapter.

    Raises:
        ModelError: the file is damaged or does not fit; the model is left as it was.
    """
    tensors, metadata = tensor_file.load(path)
    check_whole(tensors, metadata.get(tensor_file.FINGERPRINT, ""), path)
    tensors = with_shared(tensors, read_record(metadata, path) or {}, path)
    faults = mismatches(tensors, adapter_parameters(model.module, adapted.paths))
    if faults:
        raise ModelError("the adapter does not fit this model: " + "; ".join(faults), where=path)
    model.module.update(tree_unflatten(list(tensors.items())))
    mx.eval(list(tensors.values()))


def trainable(module: nn.Module) -> dict[str, mx.array]:
    """The parameters that train, by path."""
    return dict(tree_flatten(module.trainable_parameters()))


def adapter_parameters(module: nn.Module, paths: Iterable[str] = ("",)) -> dict[str, mx.array]:
    """The parameters of adapters by path, trained or not, without those of the modules that they wrap.

    Args:
        module: with the adapters in it.
        paths: of the wrapped modules; by default ``module`` is itself one.
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
        module.update(tree_unflatten(list(adapter_parameters(modules[path]).items())))
    replace_modules(model.module, again)
    model.module.freeze()
    model.module.eval()


def count(model: Model) -> dict[str, int]:
    """The number of parameters, with packed weights counted as dense ones, and of those that train."""
    packed = {path: child for path, child in model.module.named_modules() if is_packed(child)}
    weights = sum(math.prod(packed_shape(child)) for child in packed.values())
    others = sum(
        tensor.size
        for tensor in {
            id(tensor): tensor  # a tensor that several modules share counts once
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
    """Wrap the chosen modules and fill in the tensors; if these do not fit, the model is left as it was."""
    try:
        adapted = _wrap(model, choice, config, chosen, seed=0)
    except UsageError as fault:
        raise ModelError(f"the adapter does not fit this model: {fault.what}", where=path) from fault
    places = adapter_parameters(model.module, adapted.paths)
    faults = mismatches(tensors, places)
    if not faults:
        try:
            read = {id(t): t.read() if isinstance(t, LazyTensor) else t for t in tensors.values()}
        except BaseException:
            replace_modules(model.module, dict(chosen))
            raise
        cast = {id(tensor): read[id(tensor)].astype(places[n].dtype) for n, tensor in tensors.items()}
        filled = [(name, cast[id(tensor)]) for name, tensor in tensors.items()]
        odd = sorted(name for name, tensor in filled if not is_finite(tensor))
        faults = [f"{len(odd)} not finite: {listing(odd)}"] if odd else []
    if faults:
        replace_modules(model.module, dict(chosen))
        raise ModelError("the adapter does not fit this model: " + "; ".join(faults), where=path)
    model.module.update(tree_unflatten(filled))
    mx.eval(list(cast.values()))
    return dataclasses.replace(adapted, notes=tuple(notes))
