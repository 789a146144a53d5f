"""Which linears and embeddings of a model an adapter goes on, and with which options."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlxlora_core.errors import ModelError, UsageError, listing, nearest
from mlxlora_core.model.architectures import folder_args, foreign_table
from mlxlora_core.model.linears import embeddings, is_linear, layers_by_path, linears
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins import Choice
from mlxlora_core.plugins.sections import AdapterConfig, overridden

ALL_LINEAR = "all-linear"
#: names of output heads
_HEADS = ("output", "lm_head")

#: path of a module that can be adapted -> its names, here and in other libraries
Names = Mapping[str, Sequence[str]]


def names_of(model: Model) -> Names:
    """The names of the linears and embeddings of a model without an adapter.

    The names in other libraries come from the layouts of the architecture.
    """
    names = {path: [path] for found in (linears, embeddings) for path, _ in found(model.module)}
    architecture = model.architecture
    if architecture.spec.layouts:
        args = folder_args(architecture.spec, model.config)
        for layout in architecture.spec.layouts:
            for entry in foreign_table(architecture, layout, args):
                path, _, part = entry.name.rpartition(".")
                if part == "weight" and path in names:
                    names[path].append(entry.foreign.removesuffix(".weight"))
    return names


def with_targets(model: Model, config: AdapterConfig, wanted: Sequence[str] = ()) -> AdapterConfig:
    """``config``, with default targets if it has none.

    Args:
        model: to be adapted.
        config: where an adapter goes.
        wanted: the default targets of the adapter. Those that the model lacks are left out; if none
            remains, the defaults of the architecture are used.
    """
    if config.targets:
        return config
    names = names_of(model) if wanted else {}
    there = tuple(target for target in wanted if any(matches(target, names[path]) for path in names))
    targets = there or model.architecture.spec.default_targets or (ALL_LINEAR,)
    return dataclasses.replace(config, targets=targets)


def chosen_modules(model: Model, config: AdapterConfig) -> dict[str, nn.Module]:
    """path -> linear or embedding, for all that ``config`` asks for; it must name targets.

    Linears inside layers must be in the top layers that it asks for; embeddings and the output head
    are in no layer and are chosen by name alone.

    Raises:
        UsageError: a target that matches nothing, with the names that exist.
    """
    layers = len(model.language_model.layers)
    count = layers if config.layers < 0 else min(config.layers, layers)
    layer_of = layers_by_path(model.language_model)
    found = {
        path: module
        for path, module in (*linears(model.module), *embeddings(model.module))
        if (layer := layer_of(path)) is None or layer >= layers - count
    }
    names = names_of(model)
    # all-linear means the linears inside layers.
    every = {path for path, module in found.items() if layer_of(path) is not None and is_linear(module)}
    chosen = set()
    for target in config.targets:
        hit = every if target == ALL_LINEAR else {path for path in found if matches(target, names[path])}
        if not hit:
            raise _unknown(target, model, names, found, count)
        chosen |= hit
    return {path: found[path] for path in sorted(chosen)}


def modules_at(paths: Iterable[str], model: Model, where: Path) -> dict[str, nn.Module]:
    """path -> linear or embedding, for the paths that an adapter file names.

    Raises:
        ModelError: this model lacks some of them.
    """
    found = dict((*linears(model.module), *embeddings(model.module)))
    wanted = list(paths)
    absent = [path for path in wanted if path not in found]
    if absent:
        raise ModelError(f"adapts {listing(absent)}, which this model does not have", where=where)
    return {path: found[path] for path in wanted}


def options_at(paths: Iterable[str], model: Model, choice: Choice, config: AdapterConfig) -> dict[str, Any]:
    """path -> the adapter's options there.

    Args:
        paths: of the modules that the adapter goes on.
        model: without the adapter.
        choice: the adapter and its options.
        config: with the overrides.

    Raises:
        UsageError: an override that matches none of the paths, or that sets an option which the
            adapter does not have.
    """
    overrides = config.parsed_overrides
    if not overrides:
        return dict.fromkeys(paths, choice.options)
    known = names_of(model)
    names = {path: known[path] for path in paths}
    for override in overrides:
        if not any(matches(override.pattern, names[path]) for path in names):
            short = _short(names)
            raise UsageError(
                f"override '{override}' matches nothing that is adapted "
                f"({nearest(override.pattern, short)}adapted are {listing(_own(names))})"
            )
    return {
        path: overridden(choice, [o for o in overrides if matches(o.pattern, names[path])]) for path in names
    }


def refuse_named(
    declined: Mapping[str, nn.Module], model: Model, choice: Choice, config: AdapterConfig
) -> None:
    """Refuse a target that names an embedding which the adapter does not wrap.

    Args:
        declined: path -> module that the adapter did not wrap.
        model: without the adapter.
        choice: the adapter and its options.
        config: with the targets.

    Raises:
        UsageError: there is such a target.
    """
    names = names_of(model) if any(not is_linear(module) for module in declined.values()) else {}
    for path in (path for path, module in declined.items() if not is_linear(module)):
        for target in config.targets:
            if "*" not in target and matches(target, names[path]):
                raise UsageError(
                    f"adapter '{choice.component.spec.name}' does not go on embeddings, which target "
                    f"'{target}' names",
                    fix="leave it out of the targets, or take the adapter lora",
                )


def matches(target: str, names: Iterable[str]) -> bool:
    """Whether a target equals a name, or the part of one after a dot; ``*`` in it matches anything."""
    pattern = re.compile(r"(.*\.)?" + ".*".join(map(re.escape, target.split("*"))), re.DOTALL)
    return any(pattern.fullmatch(name) for name in names)


def _unknown(
    target: str, model: Model, names: Names, found: Mapping[str, nn.Module], count: int
) -> UsageError:
    """The error for a target that matches nothing."""
    what = f"adapter target '{target}' matches no linear in the top {count} layers"
    if target in _HEADS and not model.language_model.head_path:
        named = listing(path for path, module in found.items() if not is_linear(module))
        return UsageError(
            f"adapter target '{target}': the output head of this model is its embedding",
            fix=f"name {named}, which is then adapted as both",
        )
    there = {path: names[path] for path in found}
    return UsageError(
        f"{what} ({nearest(target, _short(there))}there is {listing(_own(there))}, or {ALL_LINEAR})"
    )


def _own(names: Names) -> list[str]:
    """The last parts of the paths."""
    return sorted({path.rpartition(".")[2] for path in names})


def _short(names: Names) -> list[str]:
    """The last parts of all names."""
    return sorted({name.rpartition(".")[2] for found in names.values() for name in found})
