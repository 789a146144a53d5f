"""The verbs: one module each, imported when the verb is called; and what a failure looks like."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from mlxlora_core.cli.groups import CONTEXT, LazyGroup
from mlxlora_core.errors import ExitCode, MlxloraError, bounded
from mlxlora_core.machine.limits import exhausted
from mlxlora_core.machine.signals import Interrupted
from mlxlora_core.version import __version__

#: verb -> what ``mlxlora --help`` says of it, so that help imports no verb
VERBS = {
    "run": "Do a whole recipe: convert, build data, train, evaluate and answer.",
    "report": "Write the report of a run folder again, also while the run is going on.",
    "runs": "List run folders, with state and losses, and the settings in which they differ.",
    "convert": "Turn a model of any kind into a model folder.",
    "data": "Build a dataset folder with a dataset builder.",
    "train": "Train an adapter on a dataset folder.",
    "evaluate": "Measure loss and perplexity on the test set.",
    "generate": "Continue a prompt.",
    "chat": "Talk to a model on the terminal, with and without adapters.",
    "serve": "Serve a model and its adapters over HTTP, by the OpenAI protocol.",
    "fuse": "Write a model folder with the change of one or more adapters in its weights.",
    "export": "Write a model, with or without an adapter, in the form of another tool.",
    "adapters": "List adapter files, and which bases they fit.",
    "plugins": "List plugins, and why those that are not active are not.",
    "components": "List what the plugins give, by kind.",
    "options": "Explain the options of one component.",
    "doctor": "Say what mlxlora finds on this machine, and what would make it faster.",
}

DEBUG = "MLXLORA_DEBUG"


class Verbs(LazyGroup):
    """The verbs of mlxlora, and those that plugins bring."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of a verb; one that is not ours may be a plugin's, which shows when it is called."""
        if name not in VERBS:
            from mlxlora_core.cli.plugin_verb import PluginVerb

            return PluginVerb(name, VERBS)
        return super().get_command(ctx, name)


@click.group(cls=Verbs, summaries=VERBS, modules="mlxlora_core.cli.", context_settings=CONTEXT)
@click.version_option(__version__, prog_name="mlxlora", message="%(prog)s %(version)s")
def group() -> None:
    """Fine-tune Llama- and Mistral-style models with LoRA and QLoRA on MLX.

    Every part is a plugin. Without a recipe, `mlxlora run` shows the whole of
    it on a small model that comes along. Plugins may bring more verbs: see
    `mlxlora components command`.
    """


def is_debugged(arguments: Sequence[str]) -> bool:
    """Whether a command line, or the environment, asks for tracebacks."""
    return "--debug" in arguments or os.environ.get(DEBUG, "") not in ("", "0")


def commands() -> dict[str, click.Command]:
    """Every verb, and those below one as ``VERB NAME``, in the order of the listings."""
    found: dict[str, click.Command] = {}
    for verb in VERBS:
        command = group.get_command(click.Context(group), verb)
        assert command is not None
        found[verb] = command
        if isinstance(command, LazyGroup):
            below = {name: command.get_command(click.Context(command), name) for name in command.summaries}
            found |= {f"{verb} {name}": one for name, one in below.items() if one is not None}
    return found


def execute(arguments: list[str]) -> int:
    """The exit code of a command line; every failure is one line on stderr.

    Raises:
        Interrupted: a signal came.
        KeyboardInterrupt: a SIGINT came, where its handler is Python's own.
    """
    debug = is_debugged(arguments)
    try:
        result: Any = group.main(arguments, prog_name="mlxlora", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else ExitCode.OK
    except (KeyboardInterrupt, Interrupted):
        raise
    except click.Abort as fault:  # click's word for it
        raise KeyboardInterrupt from fault
    except BaseException as fault:
        if isinstance(fault.__cause__, Interrupted):  # Python 3.11 hides what comes where a class is made
            raise fault.__cause__ from None
        if debug and not isinstance(fault, click.UsageError):
            sys.stderr.write("".join(traceback.format_exception(fault)))
        return _tell(fault)


def _tell(fault: BaseException) -> int:
    """Say what went wrong in one line; the exit code that goes with it."""
    if isinstance(fault, click.exceptions.NoArgsIsHelpError):
        fault.show()
        return ExitCode.USAGE
    if isinstance(fault, click.UsageError):
        command = fault.ctx.command_path if fault.ctx else "mlxlora"
        what = fault.format_message().replace("\n\t", " ").rstrip(".")  # click lists choices line by line
        return _say(f"{what}{'' if what.endswith('?') else '.'} See: {command} --help", ExitCode.USAGE)
    known = fault if isinstance(fault, MlxloraError) else exhausted(fault)
    if known is not None:
        return _say(str(known), known.exit_code)
    what = f"{type(fault).__name__}: {fault}"
    return _say(f"a defect of mlxlora: {what}. Fix: report it with what --debug prints", ExitCode.DEFECT)


def _say(message: str, code: int) -> int:
    sys.stderr.write(f"mlxlora: {bounded(message)}\n")
    return code
