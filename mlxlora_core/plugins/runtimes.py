"""Runtimes, started once a process before MLX computes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from mlxlora_core.errors import PluginError, one_line
from mlxlora_core.machine.device import lend, use_for_precision, use_for_products
from mlxlora_core.machine.signals import is_ours
from mlxlora_core.plugins.checks import reason_of
from mlxlora_core.plugins.lookup import Registry
from mlxlora_core.plugins.plugin import Component
from mlxlora_core.plugins.surroundings import kept
from mlxlora_core.runtime_started import RuntimeStarted


def start_runtimes(registry: Registry) -> list[RuntimeStarted]:
    """Start every runtime, once a process, before MLX computes; return what they have to say.

    A runtime that raises is a warning and leaves the others alone.
    """
    notes = [_start(component) for component in registry.of("runtime")]
    return [note for note in notes if note is not None]


@cache
def _start(component: Component) -> RuntimeStarted | None:
    """Start one, unless it is started already; what it has to say."""
    try:
        with kept(f"runtime {component.id}", look=component.plugin.origin != "built-in"):
            note: RuntimeStarted | None = component.spec.start()
        if note is not None and not isinstance(note, RuntimeStarted):
            raise PluginError(f"start gives {type(note).__name__}, wanted RuntimeStarted or None")
    except BaseException as fault:
        if is_ours(fault):
            raise
        note = RuntimeStarted(f"runtime {component.id} failed: {reason_of(fault)}", warning=True)
    if note is None:
        return None
    if note.set_threads is not None:
        use_for_products(note.set_threads)
    if note.set_precision is not None:
        use_for_precision(note.set_precision)
    for name in ("exp", "exp_rows", "log_softmax", "scaled_exp", "layers", "packed_product"):
        if getattr(note, name) is not None:
            lend(name, getattr(note, name))
    return replace(note, text=one_line(note.text))
