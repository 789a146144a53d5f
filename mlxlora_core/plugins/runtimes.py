"""Runtimes, started once a process before MLX computes."""

from __future__ import annotations

from dataclasses import replace

from mlxlora_core.errors import PluginError, one_line
from mlxlora_core.machine.device import use_exponential, use_for_products
from mlxlora_core.machine.signals import Interrupted
from mlxlora_core.plugins.checks import reason_of
from mlxlora_core.plugins.lookup import Registry
from mlxlora_core.values import RuntimeStarted


def start_runtimes(registry: Registry) -> list[RuntimeStarted]:
    """Start every runtime, once a process, before MLX computes; return what they have to say.

    A runtime that raises is a warning and leaves the others alone.
    """
    notes = []
    for component in registry.of("runtime"):
        try:
            note = component.spec.start()
            if note is not None and not isinstance(note, RuntimeStarted):
                raise PluginError(f"start gives {type(note).__name__}, wanted RuntimeStarted or None")
        except (KeyboardInterrupt, Interrupted):
            raise
        except BaseException as fault:
            note = RuntimeStarted(f"runtime {component.id} failed: {reason_of(fault)}", warning=True)
        if note is not None:
            if note.set_threads is not None:
                use_for_products(note.set_threads)
            if note.exp is not None:
                use_exponential(note.exp)
            notes.append(replace(note, text=one_line(note.text)))
    return notes
