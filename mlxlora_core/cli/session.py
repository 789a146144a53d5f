"""What every verb begins with: the plugins that it was given, and a machine made ready."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlxlora_core.cli import declare, ranks, show, streams
from mlxlora_core.cli.groups import CONTEXT, LazyGroup
from mlxlora_core.errors import SettingsChanged, bounded, listing
from mlxlora_core.files import lock
from mlxlora_core.machine.device import prepare_device
from mlxlora_core.machine.processors import THREADS, thread_count
from mlxlora_core.plugins import Registry, load, start_runtimes
from mlxlora_core.plugins.blame import told
from mlxlora_core.plugins.surroundings import kept

if TYPE_CHECKING:
    from mlxlora_core.distributed.group import Group
    from mlxlora_core.distributed.watch import Watch

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


class Verb(click.Command):
    """A command whose help shows the options under the titles that they were declared with."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line; every fault of it is one of this verb, which click does not always say."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as fault:
            fault.ctx = fault.ctx or ctx
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        for title, options in declare.sections(self, ctx).items():
            records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
            with formatter.section(title):
                formatter.write_dl(records)


class VerbGroup(LazyGroup, Verb):
    """A verb that does something by itself, and has others below it."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write its own options, and list the verbs below it."""
        Verb.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def verb(
    *decorators: Callable[[Any], Any],
    tolerant: bool = False,
    ranked: bool = False,
    below: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], click.Command]:
    """A command with ``-P`` and ``--debug``; its function gets the loaded registry first.

    Args:
        decorators: arguments and options of its own.
        tolerant: whether it goes on when ``MLXLORA_PLUGINS`` names what is not
            there, with a warning: the verbs by which that is found out.
        ranked: whether processes that were started together do it together, of which the first
            alone shows anything.
        below: the verbs that stand below it, ``VERB NAME`` in the module ``VERB_NAME``, with
            what its help says of each; its function is not called when one of them is.
    """

    def wrap(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def call(plugins: Sequence[str], **arguments: Any) -> Any:
            from mlxlora_core.distributed.environment import rank

            if click.get_current_context().invoked_subcommand is not None:
                return _refuse_options()
            code = ranks.launched(arguments.pop("ranks"), arguments.pop("hosts")) if ranked else None
            if code is not None:
                return code
            with show.silence(ranked and rank() > 0):
                return work(open_registry(plugins, tolerant), **arguments)

        def work(registry: Registry, **arguments: Any) -> Any:
            try:
                foreign = listing([p for p in registry.plugins if p.components and p.origin != "built-in"])
                with streams.apart(), told(registry.plugins), kept(f"one of {foreign}", foreign != "none"):
                    return function(registry, **arguments)
            except SettingsChanged as fault:
                show.changes(fault.rows)
                raise

        more = (ranks.OPTIONS,) if ranked else ()
        for decorator in (DEBUG_OPTION, PLUGIN_OPTION, *more, *reversed(decorators)):
            call = decorator(call)
        name = function.__module__.rpartition(".")[2]
        if below is None:
            return click.command(name, cls=Verb, context_settings=CONTEXT)(call)
        settings = {"summaries": below, "modules": f"{function.__module__}_", "context_settings": CONTEXT}
        return click.command(name, cls=VerbGroup, invoke_without_command=True, **settings)(call)

    return wrap


def _refuse_options() -> None:
    """Options that stand between a verb and one below it are not read by that one, and so are an error."""
    ctx = click.get_current_context()
    for option in ctx.command.params:
        if ctx.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{option.opts[-1]} stands before '{ctx.invoked_subcommand}', which does not read it", ctx
            )


def open_registry(plugins: Sequence[str], tolerant: bool = False) -> Registry:
    """Load the plugins; one that fails is one line on stderr."""
    registry = load(plugins, tolerant=tolerant)
    for warning in registry.warnings:
        show.warning(warning)
    for plugin in registry.failed:
        leave = f" (leave it out with -P no:{plugin.name})"
        show.progress("mlxlora: " + bounded(f"plugin {plugin} failed to load: ", plugin.reason, leave))
    return registry


def hold(target: Path) -> None:
    """Keep every other run from ``target`` until this verb ends.

    Raises:
        LockedError: another one has it.
    """
    click.get_current_context().with_resource(lock.hold(target))


@contextmanager
def joined() -> Iterator[tuple[Group, Watch]]:
    """Inside, this process is one of those that it was started with, and they watch one another.

    Alone, it is a group of its own. Ranks that compute on the same processors get a part of them each.

    Raises:
        RankError: a rank has not come in time, or is lost.
        UsageError: the environment contradicts itself, or MLX has no backend here.
    """
    from mlxlora_core.distributed.environment import is_rank
    from mlxlora_core.distributed.group import join
    from mlxlora_core.distributed.watch import watching

    if is_rank():
        prepare_device()  # before anything is computed, and so before anything goes round
    group = join()
    with watching(group) as watch:
        sharing = group.sharing_processors() if group.size > 1 else 1  # all ask, whatever they are told
        if sharing > 1 and not os.environ.get(THREADS):
            os.environ[THREADS] = str(max(1, thread_count() // sharing))
        yield group, watch


def start(registry: Registry) -> list[str]:
    """Make the machine ready for MLX; what the runtimes say, warnings on stderr too.

    Raises:
        UsageError: MLX has no backend here.
    """
    prepare_device()
    notes = start_runtimes(registry)
    for note in notes:
        if note.warning:
            show.progress(f"mlxlora: {bounded(note.text)}")
    return [note.text for note in notes]
