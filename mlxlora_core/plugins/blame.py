"""Turns an exception that arises in a plugin's code into an error that names the plugin."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mlxlora_core.errors import MlxloraError, PluginError
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.signals import is_ours
from mlxlora_core.plugins.checks import FUNCTIONS, reason_of
from mlxlora_core.plugins.plugin import Plugin
from mlxlora_core.plugins.surroundings import kept
from mlxlora_core.specs import Spec

#: functions called for every layer and token, after which checking the process would cost too much
_FREQUENT = ("matmul",)


def guarded(kind: str, spec: Spec, plugin: Plugin) -> Spec:
    """``spec`` with functions that raise only mlxlora's own errors and leave the process as it is.

    What a function returns to be called later, such as a module, is not guarded; see :func:`blamed`. Nor
    is a runtime, whose faults are warnings.
    """
    if plugin.origin == "built-in" or kind == "runtime":
        return spec
    functions: dict[str, Any] = {
        name: _guard(function, f"{name} of {kind} '{spec.name}'", plugin, name not in _FREQUENT)
        for name in FUNCTIONS[kind]
        if (function := getattr(spec, name)) is not None
    }
    return replace(spec, **functions)


@contextmanager
def told(plugins: Iterable[Plugin]) -> Iterator[None]:
    """Turn exceptions inside the block into the errors that they are for the user.

    An exception that is neither of these passes unchanged: it is a bug in mlxlora.

    Raises:
        ResourceError: disk, memory or another limit ran out.
        PluginError: a plugin's code raised it; see :func:`blamed`.
    """
    try:
        yield
    except MlxloraError:
        raise
    except BaseException as fault:
        known = None if is_ours(fault) else exhausted(fault) or blamed(plugins, fault)
        if known is None:
            raise
        raise known from fault


def blamed(plugins: Iterable[Plugin], fault: BaseException) -> PluginError | None:
    """An error that names the third-party plugin in whose code ``fault`` arose, or None.

    If one plugin has called another, as an architecture calls an adapter, the innermost is named.
    """
    foreign = [plugin for plugin in plugins if plugin.status == "active" and plugin.origin != "built-in"]
    files = [(plugin, files_of(plugin)) for plugin in foreign]
    for cause in _causes(fault):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            for plugin, own in files:
                if frame.filename in own:
                    where = f"{frame.filename}:{frame.lineno}"
                    return PluginError(f"plugin {plugin} failed: {reason_of(cause)}", where=where)
    return None


def files_of(plugin: Plugin) -> set[str]:
    """The source files of a plugin that have been imported."""
    top = plugin.value.partition(":")[0].partition(".")[0]
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == top]
    return {os.path.abspath(plugin.value), *(str(getattr(module, "__file__", None)) for module in modules)}


def _guard(function: Callable[..., Any], what: str, plugin: Plugin, looks_around: bool) -> Callable[..., Any]:
    def blame(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except MlxloraError:
            raise
        except BaseException as fault:
            if is_ours(fault):
                raise
            reason = f"plugin {plugin} failed in {what}: {reason_of(fault)}"
            raise exhausted(fault) or PluginError(reason, where=_place(plugin, fault)) from fault

    def call(*arguments: Any) -> Any:
        with kept(f"plugin {plugin}, in {what},", looks_around):
            return blame(*arguments)

    return functools.wraps(function)(call)


def _causes(fault: BaseException) -> Iterator[BaseException]:
    """An exception and those that caused it: a generator turns StopIteration into RuntimeError, for one."""
    seen: set[int] = set()
    cause: BaseException | None = fault
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__


def _place(plugin: Plugin, fault: BaseException) -> str:
    """``file:line`` of the innermost call in the plugin's own files, or nothing."""
    files = files_of(plugin)
    frames = reversed(traceback.extract_tb(fault.__traceback__))
    return next((f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename in files), "")
