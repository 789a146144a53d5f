"""A verb that a plugin brings: found by its name, and run as those of mlxlora are."""

from __future__ import annotations

from collections.abc import Iterable

import click

from mlxlora_core.cli.session import open_registry
from mlxlora_core.errors import MlxloraError, PluginError, UsageError, nearest
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.signals import is_ours
from mlxlora_core.plugins import Component, Registry
from mlxlora_core.plugins.blame import blamed
from mlxlora_core.plugins.checks import reason_of


class PluginVerb(click.Command):
    """Whatever verb mlxlora itself does not have: which plugin brings it is found out when it is called.

    ``-P`` and ``--debug`` are mlxlora's, as in every verb; all other words are the plugin's.

    Args:
        name: the verb, or its full id ``PLUGIN:NAME``.
        known: the verbs of mlxlora itself.
    """

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(name)
        self._verb, self._known = name, tuple(known)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep all words: the plugin's own command reads them."""
        ctx.args = args
        return args

    def invoke(self, ctx: click.Context) -> int:
        """Find the command and run it; its exit code.

        Raises:
            click.UsageError: no plugin has such a verb, or the command refuses its words.
            PluginError: several have it, or the one that has it fails.
            MlxloraError: as the command raises.
        """
        plugins, words = _divided(ctx.args)
        registry = open_registry(plugins)
        component = self._found(registry, ctx)
        try:
            command = component.checked("command", component.spec.command(), click.Command)
            with command.make_context(self._verb, words, parent=ctx.parent) as inner:
                command.invoke(inner)
            return 0
        except click.exceptions.Exit as end:  # of --help, and of ctx.exit(code)
            return end.exit_code
        except (MlxloraError, click.UsageError, click.Abort):
            raise
        except click.ClickException as fault:  # the words of click for what a user can mend
            raise UsageError(fault.format_message()) from fault
        except BaseException as fault:
            if is_ours(fault):
                raise
            raise exhausted(fault) or blamed(registry.plugins, fault) or _failed(component, fault) from fault

    def _found(self, registry: Registry, ctx: click.Context) -> Component:
        """The component of that name."""
        there = registry.of("command")
        if not any(component.answers_to(self._verb) for component in there):
            hint = nearest(self._verb, [*self._known, *(component.spec.name for component in there)])
            meant = f". {hint[0].upper()}{hint[1:].strip()}" if hint else ""
            raise click.UsageError(f"No such command '{self._verb}'{meant}", ctx.parent)
        return registry.find("command", self._verb)


def _divided(args: Iterable[str]) -> tuple[list[str], list[str]]:
    """What is given with ``-P``, and the words that are left for the plugin."""
    plugins: list[str] = []
    words: list[str] = []
    rest = iter(args)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == "--":
            words += [word, *rest]
        elif word in ("-P", "--plugin"):
            plugins.append(next(rest, ""))
        elif name == "--plugin" and equals:
            plugins.append(value)
        elif word != "--debug":
            words.append(word)
    return plugins, words


def _failed(component: Component, fault: BaseException) -> PluginError:
    return PluginError(f"plugin {component.plugin} failed in the command {component.id}: {reason_of(fault)}")
