"""What every verb begins with: the plugins that it was given, and a machine made ready."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mlxlora_core.cli import show
from mlxlora_core.errors import MlxloraError, PluginError, SettingsChanged, UsageError, one_line
from mlxlora_core.files import lock
from mlxlora_core.machine.device import prepare_cpu
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.registry import Plugin, Registry, load, start_runtimes

PLUGIN_OPTION = click.option(
    "-P",
    "--plugin",
    "plugins",
    multiple=True,
    metavar="NAME",
    help="Require a plugin; no:NAME leaves one out, ./file.py adds a file. May be repeated.",
)
DEBUG_OPTION = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error. [env: MLXLORA_DEBUG]"
)
SETS_OPTION = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set an option of a component, such as adapter.rank=16. May be repeated.",
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def verb(*decorators: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], click.Command]:
    """A command with ``-P`` and ``--debug``; its function gets the loaded registry first."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def call(plugins: Sequence[str], **arguments: Any) -> Any:
            registry = open_registry(plugins)
            try:
                return function(registry, **arguments)
            except SettingsChanged as fault:
                show.changes(fault.rows)
                raise
            except MlxloraError:
                raise
            except Exception as fault:
                raise exhausted(fault) or _blamed(registry, fault) from fault

        for decorator in (DEBUG_OPTION, PLUGIN_OPTION, *reversed(decorators)):
            call = decorator(call)
        from mlxlora_core.cli.verbs import CONTEXT

        return click.command(function.__module__.rpartition(".")[2], context_settings=CONTEXT)(call)

    return wrap


def open_registry(plugins: Sequence[str]) -> Registry:
    """Load the plugins; one that fails is one line on stderr."""
    registry = load(plugins)
    for plugin in registry.failed:
        click.echo(
            f"mlxlora: plugin {one_line(plugin)} failed to load: {plugin.reason} "
            f"(leave it out with -P no:{one_line(plugin.name)})",
            err=True,
        )
    return registry


def _blamed(registry: Registry, fault: Exception) -> Exception:
    """``fault``, or an error that names the third-party plugin in whose code it arose."""
    for frame in reversed(traceback.extract_tb(fault.__traceback__)):
        for plugin in registry.plugins:
            if plugin.status == "active" and plugin.origin != "built-in" and frame.filename in _files(plugin):
                what = f"plugin {plugin} failed: {type(fault).__name__}: {fault}"
                return PluginError(what, where=f"{frame.filename}:{frame.lineno}")
    return fault


def _files(plugin: Plugin) -> set[str]:
    """The source files of a plugin that are imported."""
    top = plugin.value.partition(":")[0].partition(".")[0]
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == top]
    return {os.path.abspath(plugin.value), *(str(getattr(module, "__file__", None)) for module in modules)}


def hold(target: Path) -> None:
    """Keep every other run from ``target`` until this verb ends.

    Raises:
        LockedError: another one has it.
    """
    click.get_current_context().with_resource(lock.hold(target))


def start(registry: Registry) -> list[str]:
    """Make the machine ready for MLX; what the runtimes say, warnings on stderr too.

    Raises:
        UsageError: MLX has no backend here.
    """
    try:
        prepare_cpu()
    except ImportError as fault:
        raise UsageError(
            f"MLX cannot be used: {fault}",
            fix="pip install 'mlxlora[cpu]', or 'mlxlora[cuda13]' for an NVIDIA GPU",
        ) from fault
    notes = start_runtimes(registry)
    for note in notes:
        if note.warning:
            click.echo(f"mlxlora: {one_line(note.text)}", err=True)
    return [note.text for note in notes]
