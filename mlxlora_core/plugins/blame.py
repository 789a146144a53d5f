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

#: functions that are called for every layer of every token: looking around each time would cost too much
_FREQUENT = ("matmul",)


def guarded(kind: str, spec: Spec, plugin: Plugin) -> Spec:
    """``spec`` with functions that raise errors of mlxlora's own and nothing else, and change nothing around.

    What a function gives back and is called later, such as a module, is not
    guarded; see :func:`blamed`. A runtime is not either: its faults are warnings.
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
    """Inside, a limit of the machine and a fault in a plugin's code become what they are for the user.

    What is neither goes on as it is: a defect of mlxlora.

    Raises:
        ResourceError: disk, memory or another limit is at its end.
        PluginError: see :func:`blamed`.
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
    """An error that names the plugin of somebody else in whose code ``fault`` arose, or None.

    Where one plugin has called another, such as an architecture an adapter, it is the innermost.
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
    """The source files of a plugin that are imported."""
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
    """An exception and those that led to it: a generator makes RuntimeError of StopIteration."""
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
