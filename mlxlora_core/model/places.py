"""Which linears of a model an adapter goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import mlx.nn as nn

from mlxlora_core.errors import ModelError, UsageError, listing, nearest
from mlxlora_core.model.linears import layers_by_path, linears
from mlxlora_core.model.loading import Model
from mlxlora_core.plugins.sections import AdapterConfig

ALL_LINEAR = "all-linear"


def with_targets(model: Model, config: AdapterConfig) -> AdapterConfig:
    """``config`` with the targets that the architecture names, where it has none."""
    return dataclasses.replace(
        config, targets=config.targets or model.architecture.spec.default_targets or (ALL_LINEAR,)
    )


def choose(model: Model, config: AdapterConfig) -> dict[str, nn.Module]:
    """path -> linear of all that ``config`` asks for, which names targets.

    Raises:
        UsageError: a target that matches nothing, with the names that exist.
    """
    layers = len(model.language_model.layers)
    count = layers if config.layers < 0 else min(config.layers, layers)
    layer_of = layers_by_path(model.language_model)
    found = {
        path: linear
        for path, linear in linears(model.module)
        if (layer := layer_of(path)) is not None and layer >= layers - count
    }
    names = sorted({path.rpartition(".")[2] for path in found})
    for target in config.targets:
        if not any(_matches(path, target) for path in found):
            raise UsageError(
                f"adapter target '{target}' matches no linear in the top {count} layers "
                f"({nearest(target, names)}there is {listing(names)}, or {ALL_LINEAR})"
            )
    return {
        path: linear
        for path, linear in sorted(found.items())
        if any(_matches(path, target) for target in config.targets)
    }


def at(paths: Iterable[str], model: Model, where: Path) -> dict[str, nn.Module]:
    """path -> linear of those that an adapter file names.

    Raises:
        ModelError: some of them this model does not have.
    """
    found = dict(linears(model.module))
    wanted = list(paths)
    absent = [path for path in wanted if path not in found]
    if absent:
        raise ModelError(f"adapts {listing(absent)}, which this model does not have", where=where)
    return {path: found[path] for path in wanted}


def _matches(path: str, target: str) -> bool:
    return target == ALL_LINEAR or path == target or path.endswith("." + target)
