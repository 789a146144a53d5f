"""The parameters of a model as another library stores them: a layout's table, followed backwards.

Here each parameter by itself, there names, an order of rows, shifts and stacks of the library's own;
nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxlora_core.errors import ModelError, UsageError, listing
from mlxlora_core.files.lazy_rows import restored_rows, shifted, stacked_rows
from mlxlora_core.model.architectures import foreign_table, placed
from mlxlora_core.plugins import Component
from mlxlora_core.specs import Layout
from mlxlora_core.values import ForeignTensor, LazyTensor


def foreign_config(component: Component, layout: str, args: Any, where: Path) -> Mapping[str, Any]:
    """The config of a model of ``args`` as a layout spells it.

    Raises:
        ModelError: the architecture has no such layout, or the library cannot say these arguments.
        PluginError: the architecture gives something else.
    """
    known: Layout | None = component.spec.layouts.get(layout)
    if known is None or known.write is None:
        raise ModelError(
            f"architecture '{component.spec.name}' does not write the layout '{layout}' of this exporter",
            where=where,
            fix="choose another exporter: mlxlora components exporter",
        )
    try:
        given: Any = placed(where, known.write, args)
    except UsageError as fault:
        raise ModelError(fault.what, where=where, fix=fault.fix) from fault
    if not isinstance(given, Mapping):
        raise component.breach("write", type(given).__name__, "a mapping of keys to values")
    return given


def foreign_places(component: Component, layout: str, args: Any) -> dict[str, ForeignTensor]:
    """Parameter -> how it is stored in a layout.

    Raises:
        PluginError: the architecture's table breaks its contract.
    """
    return {entry.name: entry for entry in foreign_table(component, layout, args)}


def foreign_tensors(
    component: Component, tensors: Mapping[str, LazyTensor], places: Mapping[str, ForeignTensor]
) -> dict[str, LazyTensor]:
    """name there -> tensor, made of the parameters; packed where all that it is made of is packed alike.

    Args:
        component: the architecture, for messages.
        tensors: every parameter.
        places: where each is stored.

    Raises:
        PluginError: the table leaves out parameters, or has others, or parts that leave rows out.
    """
    other = sorted(tensors.keys() ^ places.keys())
    if other:
        raise component.breach("table", f"entries that differ by {listing(other)}", "one for each parameter")
    stacks: dict[str, list[ForeignTensor]] = {}
    for entry in places.values():
        stacks.setdefault(entry.foreign, []).append(entry)
    return {name: _stacked(component, entries, tensors) for name, entries in stacks.items()}


def _stacked(
    component: Component, entries: list[ForeignTensor], tensors: Mapping[str, LazyTensor]
) -> LazyTensor:
    """The one tensor there that some parameters make."""
    if len(entries) == 1 and entries[0].start in (None, 0):
        return _there(entries[0], tensors[entries[0].name])
    ordered = sorted(entries, key=lambda entry: entry.start or 0)
    rows = 0
    for entry in ordered:
        if entry.start != rows:
            got = f"{entry.name} from row {entry.start} of {entry.foreign}"
            raise component.breach("table", got, f"from row {rows}")
        rows += tensors[entry.name].shape[0]
    return stacked_rows([_there(entry, tensors[entry.name]) for entry in ordered])


def _there(entry: ForeignTensor, tensor: LazyTensor) -> LazyTensor:
    """A parameter with its rows ordered and its numbers shifted as there."""
    if entry.rows is not None:
        tensor = restored_rows(tensor, entry.rows)
    return shifted(tensor, -entry.shift) if entry.shift else tensor
