"""The linears of a model by the names that another library has for them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.nn as nn

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.model.architectures import folder_args, foreign_table
from mlxlora_core.model.linears import is_linear, linear_shape
from mlxlora_core.model.loading import Model

#: what libraries put in front of the path of a module
_WRAPPERS = frozenset({"base_model", "model", "language_model", "text_model", "module", "_orig_mod"})


@dataclass(frozen=True)
class Part:
    """A linear here, as a module of another library or a part of one.

    Attributes:
        path: of the linear here.
        rows: for each output here which one it is there, counted from ``start``, or None where
            they are in the same order.
        start: its first output there, of a module in which several are fused; None for a whole one.
        outputs: how many it has, or 0 where it is no linear.
        inputs: how many it has, likewise.
    """

    path: str
    rows: Sequence[int] | None = None
    start: int | None = None
    outputs: int = 0
    inputs: int = 0


def parts_of(model: Model, layout: str, paths: Sequence[str]) -> dict[str, list[Part]]:
    """Module path there -> the linears here that it stands for.

    A path that is one of this model's own stands for that. Others are looked up in the table of
    the model's architecture, without what libraries put in front of a model.

    Args:
        model: that has the linears.
        layout: whose names these are; nothing for the architecture's own.
        paths: of modules there.

    Raises:
        ModelError: a module that this model does not have, or a linear under two names.
    """
    own = dict(model.module.named_modules())
    theirs = _table(model, layout, own)
    found = {path: [_part(path, own)] if path in own else theirs.get(_bare(path), []) for path in paths}
    absent = [path for path, parts in found.items() if not parts]
    if absent:
        raise ModelError(f"adapts {listing(absent)}, which this model does not have")
    counted = Counter(part.path for parts in found.values() for part in parts)
    twice = [path for path, count in counted.items() if count > 1]
    if twice:
        raise ModelError(f"adapts {listing(twice)} under two names")
    return found


def _table(model: Model, layout: str, own: Mapping[str, nn.Module]) -> dict[str, list[Part]]:
    """Bare path there -> linears here, in the order of their outputs there."""
    if layout not in model.architecture.spec.layouts:
        return {}
    found: dict[str, list[Part]] = defaultdict(list)
    args = folder_args(model.architecture.spec, model.config)
    for entry in foreign_table(model.architecture, layout, args):
        path = entry.name.removesuffix(".weight")
        if path == entry.name or path not in own:
            continue
        part = _part(path, own, entry.rows, entry.start)
        found[_bare(entry.foreign.removesuffix(".weight"))].append(part)
    return {path: sorted(parts, key=lambda part: part.start or 0) for path, parts in found.items()}


def _part(
    path: str, own: Mapping[str, nn.Module], rows: Sequence[int] | None = None, start: int | None = None
) -> Part:
    """A module of this model."""
    outputs, inputs = linear_shape(own[path])[-2:] if is_linear(own[path]) else (0, 0)
    return Part(path, rows, start, outputs, inputs)


def _bare(path: str) -> str:
    """A module path without what libraries put in front of it."""
    names = path.split(".")
    first = next((i for i, name in enumerate(names) if name not in _WRAPPERS), len(names) - 1)
    return ".".join(names[first:])
